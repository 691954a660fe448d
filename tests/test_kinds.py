"""Sink kinds: what each computes, that it trains and continues exactly, and that a file is all it takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grids import by_default
from test_fit import assert_same_state
from torch import Tensor

import sinktrain
from sinktrain.model.attention import CausalAttention
from sinktrain.model.checkpoints import load_model
from sinktrain.model.config import ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.init import SINK_PART, continue_from, initialize
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import apply_rotary, phase_steps
from sinktrain.model.sinks.base import KINDS, NullSlot

SIZES = NetworkConfig(32, 2, 4, vocab_size=64, max_position_embeddings=32, rotary_pct=0.5)
SINK_ID = 60
CONSTANT = ["--model.schedule", "wsd", "--model.decay_steps", "0"]
all_kinds = pytest.mark.parametrize("kind", sorted(KINDS))


def model_of(kind: str, seed: int = 1) -> GPTNeoX:
    ids = (SINK_ID,) if KINDS[kind].has_tokens else ()
    model = GPTNeoX(ModelConfig(SIZES, SinkConfig(kind, 1, ids)))
    initialize(model, seed)
    return model


def drawn_sinks(model: GPTNeoX) -> GPTNeoX:
    """The model in float64, what its sinks learn drawn so large that it counts."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.double().named_parameters():
        if SINK_PART in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return model


# -- what a kind computes -------------------------------------------------------------------------


def with_a_column(
    attend: CausalAttention, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None
) -> Tensor:
    """Slow twin of dense attention: all scores, the null slot's in front."""
    q, k = apply_rotary(q, attend.cos, attend.sin), apply_rotary(k, attend.cos, attend.sin)
    seq, scale = q.shape[2], q.shape[3] ** -0.5
    is_later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(is_later, -torch.inf)
    if null is None:
        return scores.softmax(dim=-1) @ v
    _, score, value = null
    key = null.in_front(attend.rotary_steps).key
    first = torch.zeros_like(scores[..., :1])
    first = first if key is None else first + (q @ key[..., None]) * scale
    first = first if score is None else first + score[:, None, None]
    weights = torch.cat((first, scores), dim=-1).softmax(dim=-1)
    mixed = weights[..., 1:] @ v
    return mixed if value is None else mixed + weights[..., :1] * value[:, None]


@all_kinds
def test_dense_attention_and_its_gradients_equal_the_slow_twins(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = drawn_sinks(model_of(kind))
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))

    def loss_and_gradients() -> list[Tensor]:
        loss = model(tokens, tokens)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    found = loss_and_gradients()
    monkeypatch.setattr(CausalAttention, "__call__", with_a_column)
    for one, other in zip(found, loss_and_gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_kinds_are_what_their_papers_say() -> None:
    """Of one query with two keys: scores a and b, values 1 and 2."""
    scores, values = torch.tensor([0.5, -1.0]), torch.tensor([[1.0], [2.0]])

    def mixed(null: NullSlot | None) -> float:
        q, k = torch.ones(1, 1, 2, 1), scores[None, None, :, None]
        attend = CausalAttention(torch.empty(0, dtype=torch.int64), 2, torch.float32)
        return float(attend(0, q, k, values[None, None], null)[0, 0, 1, 0])

    powers = scores.exp()
    summed, total = float(powers @ values[:, 0]), float(powers.sum())
    a = torch.tensor([[0.7]])
    assert mixed(None) == pytest.approx(summed / total)
    assert mixed(NullSlot()) == pytest.approx(summed / (1 + total))
    assert mixed(NullSlot(score=a[0])) == pytest.approx(summed / (a.exp().item() + total))
    assert mixed(NullSlot(key=a)) == pytest.approx(summed / (a.exp().item() + total))
    both = (summed + a.exp().item() * 3) / (a.exp().item() + total)
    assert mixed(NullSlot(key=a, value=torch.tensor([[3.0]]))) == pytest.approx(both)
    gate = KINDS["gate"](4, 2)
    torch.nn.init.constant_(next(gate.parameters()), 0.25)
    assert gate.output_scale(torch.ones(1, 1, 4)).tolist() == [[[pytest.approx(0.7310586)] * 2]]


# -- training -------------------------------------------------------------------------------------


@all_kinds
def test_kinds_share_all_initial_weights_but_their_own(kind: str) -> None:
    vanilla, other = model_of("none").state_dict(), model_of(kind).state_dict()
    assert {name for name in other if SINK_PART not in name} == set(vanilla)
    assert all(torch.equal(value, other[name]) for name, value in vanilla.items())
    again = model_of(kind).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in other.items())


@all_kinds
def test_what_a_kind_starts_with_is_no_tokens_embedding(kind: str) -> None:
    """Both are drawn from one seed, and with one standard deviation."""
    model = model_of(kind)
    embedding = model.gpt_neox.embed_in.weight.flatten().tolist()
    drawn = [p.flatten().tolist() for name, p in model.named_parameters() if SINK_PART in name]
    assert not {value for part in drawn for value in part if value} & set(embedding)


@pytest.mark.parametrize(
    "kind", by_default(["token", "kv_bias"], slow=sorted(KINDS.keys() - {"token", "kv_bias"}))
)
def test_a_run_of_any_kind_learns_and_continues_bit_for_bit(kind: str, train: Callable[..., Path]) -> None:
    options = [*CONSTANT, "--model.sink.kind", kind]
    whole = train("whole", *options, "--trainer.max_steps", "8")
    train("parts", *options, "--trainer.max_steps", "4")
    parts = train("parts", *options, "--trainer.max_steps", "8")
    assert_same_state(whole, parts)
    model = load_model(whole)
    assert model.config.sink.kind == kind
    started = GPTNeoX(model.config)
    initialize(started, 1234)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), started.parameters(), strict=True)]
    assert all(changed)


@all_kinds
def test_a_kind_is_given_to_a_trained_model_of_another(kind: str) -> None:
    for source in ("none", "gate"):
        model, trained = model_of(kind, seed=5), model_of(source, seed=6)
        continue_from(model, trained, seed=7)
        kept = {name: value for name, value in trained.state_dict().items() if SINK_PART not in name}
        kept.pop("gpt_neox.embed_in.weight")  # where a token's row is drawn
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
        own = [name for name in model.state_dict() if SINK_PART in name]
        if kind == source:
            assert all(torch.equal(model.state_dict()[name], trained.state_dict()[name]) for name in own)
        assert all(model.state_dict()[name].isfinite().all() for name in own)


# -- a file more or less --------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to add and to remove kinds."""
    copy = tmp_path / "copy" / "sinktrain"
    shutil.copytree(Path(sinktrain.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run_python(package: Path, code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_EACH_KIND = """
import torch
from sinktrain.model.config import *
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.init import initialize
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming.blockwise import stream_logits
from sinktrain.streaming.decoder import StreamingDecoder
tokens = torch.arange(40)[None]
for name in sorted(KINDS):
    ids = (60,) if KINDS[name].has_tokens else ()
    network = NetworkConfig(32, 2, 4, vocab_size=64, max_position_embeddings=32)
    model = GPTNeoX(ModelConfig(network, SinkConfig(name, 1, ids))).double()
    initialize(model, 0)
    model(tokens, tokens).backward()
    fed = torch.cat((torch.tensor([model.sink_ids], dtype=torch.int64).view(1, -1), tokens), dim=1)
    decoder = StreamingDecoder(model, 1, 7)
    steps = torch.stack([decoder.step(token) for token in fed.T], dim=1)
    blocks = torch.cat(list(stream_logits(model, fed, 1, 7)), dim=1)
    print(name, float((steps - blocks).abs().max()) < 1e-10)
"""


def test_a_kind_may_share_parts_among_heads() -> None:
    """Expanded, they are not dense; the kernels of training, which read plain memory, get them so."""
    pytest.importorskip("triton")
    from sinktrain.model import fused_attention

    if torch.cuda.is_available():
        pytest.skip("cuDNN takes half precision alone")
    generator = torch.Generator().manual_seed(0)
    x, key, value = (torch.randn(size, generator=generator) for size in ((1, 5, 32), (1, 16), (1, 16)))
    shared = NullSlot(key.expand(2, -1), torch.ones(1).expand(2), value.expand(2, -1))
    projection, steps = torch.nn.Linear(32, 96), phase_steps(8, 10_000)
    attend = CausalAttention(steps, 5, torch.float32)
    found = fused_attention.projected_attention(
        x, projection.weight, projection.bias, attend.cos, attend.sin, 2, True, *shared.in_front(steps)
    )[0]
    q, k, v = projection(x).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
    expected = attend(0, q, k, v, shared).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none"}))
def test_a_kind_without_its_file_breaks_no_other(kind: str, package: Path) -> None:
    Path(package / "model" / "sinks" / f"{kind}.py").unlink()
    others = sorted(set(KINDS) - {kind})
    assert run_python(package, USE_EACH_KIND).splitlines() == [f"{name} True" for name in others]


@pytest.mark.slow
def test_readmes_example_is_a_kind_that_trains_and_streams(package: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    [(path, code)] = re.findall(r"```python\n# sinktrain/(model/sinks/\w+\.py)\n(.*?)```", readme, re.S)
    assert code.count("\n") < 60
    (package / path).write_text(code)
    assert f"{Path(path).stem} True" in run_python(package, USE_EACH_KIND).splitlines()
