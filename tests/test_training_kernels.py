"""Training's Triton kernels against their plain twins: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sinktrain.data.windows import IGNORED
from sinktrain.model import attention
from sinktrain.model.loss import token_losses
from sinktrain.model.rotary import apply_rotary, phase_steps, rotary_angles

pytest.importorskip("triton")
fused = pytest.importorskip("sinktrain.model.fused")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = [
    pytest.param(4, 32, 8, id="14m"),
    pytest.param(12, 64, 16, id="160m"),
    pytest.param(8, 256, 64, id="1b"),
    pytest.param(3, 40, 40, id="all-rotated"),
    pytest.param(5, 24, 6, id="odd"),
    pytest.param(2, 16, 0, id="none-rotated"),
]
"""Heads, head_dim, rotary_ndims."""


@pytest.fixture(autouse=True)
def _nothing_is_left_unwritten() -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# -- rotation -------------------------------------------------------------------------------------


def queries_and_keys(heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """As ``Attention.forward`` makes them: views of the fused projection, [batch, head, seq, head_dim]."""
    fused_qkv = drawn(2, 3, heads * 3 * head_dim, dtype=dtype)
    q, k, _ = fused_qkv.unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    assert not q.is_contiguous()
    return q, k


def angles(rotary_ndims: int, seq: int = 3) -> tuple[Tensor, Tensor]:
    steps = phase_steps(rotary_ndims, 10_000).to(DEVICE)
    return rotary_angles(torch.arange(1000, 1000 + seq, device=DEVICE), steps, torch.float32)


@pytest.mark.parametrize(("heads", "head_dim", "rotary_ndims"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotating_by_kernel_equals_apply_rotary(
    heads: int, head_dim: int, rotary_ndims: int, dtype: torch.dtype
) -> None:
    cos, sin = angles(rotary_ndims)
    for x in queries_and_keys(heads, head_dim, dtype):
        found, expected = fused.rotate(x, cos, sin), apply_rotary(x, cos, sin)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        else:  # the same float32 arithmetic, rounded once: rarely another neighbour
            torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("heads", "head_dim", "rotary_ndims"), SIZES)
def test_the_gradient_of_a_rotation_equals_autograds(heads: int, head_dim: int, rotary_ndims: int) -> None:
    cos, sin = angles(rotary_ndims)
    upstream = drawn(2, 3, heads, head_dim, seed=1).transpose(1, 2)  # strided, as attention's may be
    gradients = []
    for rotation in (fused.rotate, apply_rotary):
        fused_qkv = drawn(2, 3, heads * 3 * head_dim).requires_grad_(True)
        q, k, _ = fused_qkv.unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        (rotation(q, cos, sin) * upstream + rotation(k, cos, sin) * upstream**2).sum().backward()
        gradients.append(fused_qkv.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_a_gradient_that_is_one_number_for_all_is_rotated_too() -> None:
    """The gradient of a sum has stride 0 everywhere."""
    cos, sin = angles(8)
    gradients = []
    for rotation in (fused.rotate, apply_rotary):
        x = drawn(2, 4, 3, 32).requires_grad_(True)
        rotation(x, cos, sin).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_causal_attention_with_the_kernel_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = phase_steps(16, 10_000).to(DEVICE)
    q, k = queries_and_keys(3, 64)
    mixed = []
    for has_fast_path in (True, False):
        monkeypatch.setattr(attention, "has_fast_path", lambda x, answer=has_fast_path: answer)
        mixed.append(attention.CausalAttention(steps, 3, torch.float32)(0, q, k, q))
    torch.testing.assert_close(*mixed, rtol=0, atol=1e-5)


# -- loss -----------------------------------------------------------------------------------------

CASES = [
    pytest.param(13, 97, 2**30, id="one-chunk"),
    pytest.param(19, 97, 4 * 97 * 8, id="three-chunks"),  # the last of 3 rows
    pytest.param(1, 5, 2**30, id="one-row"),
    pytest.param(5, 8192 + 57, 2**30, id="two-blocks-of-vocabulary"),
]
"""Rows, vocabulary, bytes of logits held at once (for float32)."""


def hold(logits_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LOGITS_BYTES", logits_bytes)
    monkeypatch.setattr(fused, "CHUNK_ROWS", 8)


def loss_inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and targets, every third of them not scored."""
    hidden = drawn(rows, 24, dtype=dtype).requires_grad_(True)
    head = (drawn(vocab, 24, seed=1) / 2).requires_grad_(True)
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[2::3] = IGNORED
    return hidden, head, targets


def plain_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """In float64, from the values that the kernel sees."""
    return token_losses(hidden.double() @ head.to(hidden.dtype).double().t(), targets).sum()


def difference(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference, relative to the expected one's."""
    assert found is not None
    assert expected is not None
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("rows", "vocab", "logits_bytes"), CASES)
def test_the_loss_without_logits_equals_that_of_the_logits(
    rows: int, vocab: int, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "LOGITS_BYTES", logits_bytes)
    inputs = loss_inputs(rows, vocab, torch.float32)
    found, expected = fused.linear_loss(*inputs), plain_loss(*inputs)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("rows", "vocab", "logits_bytes"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["float32", "bfloat16"]
)
def test_gradients_without_logits_equal_autograds(
    dtype: torch.dtype,
    tolerance: float,
    rows: int,
    vocab: int,
    logits_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16 the logits, their gradient and the result are rounded: 2^-9 each, at most."""
    hold(logits_bytes * dtype.itemsize // 4, monkeypatch)
    found, expected = loss_inputs(rows, vocab, dtype), loss_inputs(rows, vocab, dtype)
    loss, twin = fused.linear_loss_and_gradients(*found)[0], plain_loss(*expected)
    assert loss.item() == pytest.approx(twin.item(), rel=tolerance)
    (loss / 3).backward()
    (twin / 3).backward()
    for name, a, b in zip(("hidden", "head"), found, expected, strict=False):
        assert a.grad is not None
        assert a.grad.dtype == a.dtype
        off = difference(a.grad, b.grad)
        assert off < tolerance, f"{name}: {off:.1e}"


def test_scaling_a_gradient_leaves_no_bias_in_bfloat16() -> None:
    """A mean's 1 / count was once rounded to bfloat16 itself, which scaled what came after by up to 1/512."""
    hidden, head, targets = loss_inputs(20, 97, torch.bfloat16)
    loss, to_hidden, _ = fused.linear_loss_and_gradients(hidden, head, targets)
    upstream = 1.0 / 509
    (loss * upstream).backward()
    assert hidden.grad is not None
    exact, grad = to_hidden.detach().double(), hidden.grad.double()
    ratio = (grad * exact).sum().item() / exact.square().sum().item()
    assert ratio == pytest.approx(upstream, rel=8e-4)


def test_targets_that_are_none_cost_nothing() -> None:
    hidden, head, targets = loss_inputs(4, 97, torch.float32)
    loss, to_hidden, to_head = fused.linear_loss_and_gradients(
        hidden, head, torch.full_like(targets, IGNORED)
    )
    assert loss.item() == 0
    assert not to_hidden.any()
    assert not to_head.any()


def test_logits_far_from_zero_overflow_nothing() -> None:
    hidden, head, targets = loss_inputs(8, 97, torch.float32)
    inputs = (hidden.detach() * 200, head.detach(), targets)
    loss, to_hidden, _ = fused.linear_loss_and_gradients(*inputs)
    assert loss.item() == pytest.approx(plain_loss(*inputs).item(), rel=1e-5)
    assert to_hidden.isfinite().all()


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_makes_the_loss_not_finite(spoiled: float) -> None:
    """The guard skips by the loss: it must not come out clean."""
    hidden, head, targets = loss_inputs(8, 97, torch.float32)
    hidden = hidden.detach().clone()
    hidden[0, 0] = spoiled
    assert not fused.linear_loss(hidden, head, targets).isfinite()


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700, 5000])
@pytest.mark.parametrize("logits_bytes", [1, 4 * 97 * 256, 4 * 97 * 1000, 2**30])
def test_chunks_are_all_rows_once_and_hold_what_they_may(
    rows: int, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "LOGITS_BYTES", logits_bytes)
    chunks = fused._chunks(torch.empty(rows, 3), torch.empty(97, 3))
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    longest = max(len(range(rows)[chunk]) for chunk in chunks)
    assert longest <= max(256, logits_bytes // (4 * 97) + 255)
