"""What training fuses of a layer, against plain torch: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinktrain.model.attention import CausalAttention
from sinktrain.model.config import NetworkConfig
from sinktrain.model.neox import MLP
from sinktrain.model.rotary import apply_rotary, phase_steps
from sinktrain.model.sinks.base import KINDS, NullSlot

pytest.importorskip("triton")
from sinktrain.model import fused_attention
from sinktrain.model.fused_mlp import gelu_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [
    pytest.param(4, 32, 8, id="14m", marks=pytest.mark.slow),
    pytest.param(12, 64, 16, id="160m", marks=pytest.mark.slow),
    pytest.param(3, 40, 40, id="all-rotated"),
    pytest.param(5, 24, 6, id="odd"),
]
"""Heads, head_dim, rotary_ndims."""
BATCH, SEQ = 2, 23


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def angles(rotary_ndims: int) -> tuple[Tensor, Tensor]:
    attend = CausalAttention(phase_steps(rotary_ndims, 10_000).to(DEVICE), SEQ, torch.float32)
    return attend.cos, attend.sin


def by_head(qkv: Tensor) -> list[Tensor]:
    return [part.transpose(1, 2) for part in qkv.chunk(3, dim=-1)]


@pytest.mark.parametrize(("heads", "head_dim", "rotary_ndims"), SIZES)
def test_queries_and_keys_are_rotated_where_they_are(heads: int, head_dim: int, rotary_ndims: int) -> None:
    qkv, (cos, sin) = drawn(BATCH, SEQ, heads, 3 * head_dim), angles(rotary_ndims)
    q, k, v = by_head(qkv)
    expected = [apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v.clone()]
    fused_attention.rotate_in_place(qkv, cos, sin)
    for found, wanted in zip(by_head(qkv), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("heads", "head_dim", "rotary_ndims"), SIZES)
def test_gradients_are_rotated_back_joined_and_summed(heads: int, head_dim: int, rotary_ndims: int) -> None:
    cos, sin = angles(rotary_ndims)
    qkv = drawn(BATCH, SEQ, heads, 3 * head_dim).requires_grad_()
    gradients = [drawn(BATCH, heads, SEQ, head_dim, seed=seed) for seed in (1, 2, 3)]
    q, k, v = by_head(qkv)
    torch.autograd.backward([apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v], gradients)
    assert qkv.grad is not None
    joined, sums = fused_attention.join_gradients(gradients, cos, sin)
    torch.testing.assert_close(joined, qkv.grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(sums, qkv.grad.sum((0, 1)).flatten(), rtol=1e-5, atol=1e-5)


def null_slots() -> list[object]:
    """Of every kind that has one, and one with all parts; parameters random."""
    heads, head_dim = 2, 16
    own = {name: kind(heads * head_dim, heads) for name, kind in KINDS.items()}
    for sink in own.values():
        for number, parameter in enumerate(sink.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    slots = {name: sink.to(DEVICE).null_slot() for name, sink in own.items()}
    parts = drawn(heads, head_dim), drawn(heads, seed=1), drawn(heads, head_dim, seed=2)
    slots["all parts"] = NullSlot(*(part.requires_grad_() for part in parts))
    return [
        pytest.param(slot, id=name, marks=() if name in ("all parts", "kv_bias") else pytest.mark.slow)
        for name, slot in slots.items()
        if slot is not None
    ]


@pytest.mark.parametrize("slot", null_slots())
def test_attention_with_a_null_slot_and_its_gradients_equal_the_plain_ones(slot: NullSlot) -> None:
    """With all parts, tokens are more than one block of the kernels, and no whole number of them."""
    has_all = all(part is not None for part in slot)
    (batch, seq), heads, head_dim = (1, 131) if has_all else (2, 11), 2, 16
    steps = phase_steps(8, 10_000).to(DEVICE)
    attend = CausalAttention(steps, seq, torch.float32)
    projection = torch.nn.Linear(heads * head_dim, 3 * heads * head_dim).to(DEVICE)
    x, upstream = (
        drawn(batch, seq, heads * head_dim).requires_grad_(),
        drawn(batch, seq, heads * head_dim, seed=1),
    )
    if DEVICE == "cuda":  # cuDNN takes half precision alone
        pytest.skip("tests/test_gpu.py compares them there")
    weights = projection.weight, projection.bias
    found = fused_attention.projected_attention(
        x, *weights, attend.cos, attend.sin, heads, True, *slot.in_front(steps)
    )[0]
    q, k, v = projection(x).unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    expected = attend(0, q, k, v, slot).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    leaves = [x, *weights, *(part for part in slot if part is not None)]
    gradients = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * other.abs().max().item())


@pytest.mark.slow
def test_attentions_operator_keeps_what_torch_compile_is_told() -> None:
    if DEVICE == "cuda":
        pytest.skip("cuDNN takes half precision alone")
    cos, sin = (part[:3] for part in angles(8))
    weights = drawn(3 * 16, 16).requires_grad_(), drawn(3 * 16).requires_grad_()
    arguments = drawn(1, 3, 16).requires_grad_(), *weights, cos, sin, 1
    null = drawn(1, 16).requires_grad_(), None, drawn(1, 16).requires_grad_()
    torch.library.opcheck(fused_attention.projected_attention, (*arguments, True, *null))
    torch.library.opcheck(fused_attention.projected_attention, arguments)


@pytest.mark.parametrize("rows", [1, 300])
def test_mlp_that_keeps_no_activations_equals_the_plain_one(rows: int) -> None:
    """300 rows are more than one block of the kernel, and no whole number of them."""
    mlp = MLP(NetworkConfig(48, 1, 2)).to(DEVICE)
    up, down = mlp.dense_h_to_4h, mlp.dense_4h_to_h
    x, upstream = drawn(rows, 1, 48).requires_grad_(), drawn(rows, 1, 48, seed=1)
    with torch.no_grad():
        expected = mlp(x)  # without gradients always the plain one
    plain = down(torch.nn.functional.gelu(up(x)))
    plain.backward(upstream)
    wanted = [x.grad, *(parameter.grad for parameter in mlp.parameters())]
    x.grad = None
    mlp.zero_grad()
    found = gelu_mlp(x, up.weight, up.bias, down.weight)[0] + down.bias
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip([x.grad, *(p.grad for p in mlp.parameters())], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_mlps_operator_keeps_what_torch_compile_is_told() -> None:
    mlp = MLP(NetworkConfig(16, 1, 2)).to(DEVICE)
    weights = list(mlp.parameters())[:3]
    torch.library.opcheck(gelu_mlp, (drawn(2, 3, 16).requires_grad_(), *weights))


def test_a_cpu_has_no_fused_attention() -> None:
    assert not fused_attention.is_served(torch.device("cpu"), torch.bfloat16, head_dim=64, rotary_ndims=16)
