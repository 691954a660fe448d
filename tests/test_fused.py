"""The Triton kernels of a step against the plain step: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import by_default, thinned
from oracles import EveryPart, model_with_every_part, random_tokens, rotate_everything_stream, tiny_model
from torch import nn

from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming import step
from sinktrain.streaming.blocks import advance
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.plain import PlainStep
from sinktrain.streaming.ring import RingCache

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_SMALL_HEADS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def largest_difference(
    num_fed: int,
    rows: int = 1,
    layout: str = "1+70",
    spare: int = 0,
    restart: int | None = None,
    is_split: bool = True,
    num_steps: int = 2,
    make: Callable[..., GPTNeoX] = tiny_model,
    **sizes: Any,
) -> float:
    """Between fused and plain steps after ``num_fed`` tokens, in logits, keys, values and ages.

    Args:
        is_split: whether several programs may share the slots of a stream; else one takes all tiles of them.
    """
    from sinktrain.streaming.fused import FusedStep

    model = make(**{"dtype": torch.float32, "num_hidden_layers": 1, **sizes}).to(DEVICE)
    tokens = random_tokens(rows, num_fed + num_steps).to(DEVICE)
    plain, fused = (RingCache(model, Layout.parse(layout), rows, 7, spare) for _ in range(2))
    for cache in (plain, fused):
        if num_fed:
            list(advance(model, tokens[:, :num_fed], cache))
        if restart is not None:
            cache.reset([restart])
    token = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    fused_step = FusedStep(model, fused, token, use_pdl=False)
    if not is_split:
        fused_step.tiles, fused_step.splits = fused_step.tiles * fused_step.splits, 1
    steps = PlainStep(model, plain, token), fused_step
    worst = 0.0
    for index in range(num_steps):
        token.copy_(tokens[:, num_fed + index])
        logits = [step() for step in steps]
        for cache in (plain, fused):
            cache.shift_bounds(1)
        pairs = [logits, [plain.keys, fused.keys], [plain.values, fused.values]]
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
        assert torch.equal(plain.age, fused.age)
        assert torch.equal(plain.tokens, fused.tokens)
    return worst


@pytest.mark.parametrize(
    ("num_fed", "rows"), [(0, 1), (1, 1), (40, 2), (150, 1), *by_default([], slow=[(300, 1), (300, 2)])]
)
def test_kernels_equal_the_plain_step_before_and_after_the_ring_wraps(num_fed: int, rows: int) -> None:
    assert largest_difference(num_fed, rows, **TWO_SMALL_HEADS) < 2e-5


@pytest.mark.parametrize("layout", by_default(["0+20", "40+30"], slow=["4+33", "2+1"]))
def test_kernels_equal_the_plain_step_for_layouts_with_no_sink_and_with_many(layout: str) -> None:
    assert largest_difference(100, layout=layout, **TWO_SMALL_HEADS) < 2e-5


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes",
    [
        {"rotary_pct": 0},
        {"rotary_pct": 1},
        {"attention_bias": False},
        {"use_parallel_residual": False, "hidden_act": "silu"},
        {"hidden_act": "gelu_new", "intermediate_size": 48},
        {"hidden_act": "relu"},
        {"hidden_size": 24, "num_attention_heads": 3, "rotary_pct": 0.5},
        pytest.param({"hidden_size": 256, "num_attention_heads": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernels_equal_the_plain_step_for_every_kind_of_network(sizes: dict[str, Any], rows: int) -> None:
    assert largest_difference(80, rows, "1+40", num_steps=1, **sizes) < 5e-5


def test_kernels_equal_the_plain_step_with_spare_slots_and_rows_of_mixed_ages() -> None:
    options = {"spare": 5, "restart": 1, **TWO_SMALL_HEADS}
    assert largest_difference(90, rows=3, layout="2+31", **options) < 2e-5


@pytest.mark.parametrize(
    ("kind", "rows", "layout", "is_split"),
    thinned(sorted(KINDS), [(1, "0+12", True), (1, "1+40", False), (2, "4+13", True)]),
)
def test_kernels_equal_the_plain_step_for_every_sink_kind(
    kind: str, rows: int, layout: str, is_split: bool
) -> None:
    """By one program in one tile of slots, by one in two tiles, and by two programs; all slots are full."""
    options = {"is_split": is_split, "num_steps": 1, "kind": kind, **TWO_SMALL_HEADS}
    assert largest_difference(45, rows, layout, **options) < 2e-5


class Gated(EveryPart):
    """With a scale that the kernels know, and a bias in it."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.linear = nn.Linear(hidden_size, num_heads)

    def output_scale(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(x))

    def output_gate(self) -> nn.Linear:
        return self.linear


def gated_model(**options: Any) -> GPTNeoX:
    """``model_with_every_part``, but ``Gated``."""
    model = model_with_every_part(**options)
    for layer in model.gpt_neox.layers:
        num_heads, width = layer.attention.sink.gate.shape
        gated = Gated(width, num_heads).to(model.dtype).requires_grad_(False)
        parts = layer.attention.sink.state_dict()
        own = {"linear.weight": parts["gate"], "linear.bias": torch.linspace(-2, 2, num_heads)}
        gated.load_state_dict(parts | own)
        layer.attention.sink = gated
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"num_fed": 0, "rows": 2, "layout": "2+5", "num_steps": 2, "num_hidden_layers": 2},
        {"rows": 1, "rotary_pct": 0},
        {"rows": 1, "hidden_size": 24, "num_attention_heads": 3},
        {"rows": 1, "use_parallel_residual": False},
        {"rows": 2, "use_parallel_residual": False, "attention_bias": False},
    ],
    ids=str,
)
def test_kernels_equal_the_plain_step_for_a_null_slot_of_every_part_and_gates(
    options: dict[str, Any],
) -> None:
    given = {"num_fed": 50, "layout": "1+40", "num_steps": 1, **TWO_SMALL_HEADS, **options}
    assert largest_difference(make=gated_model, **given) < 2e-5


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("rows", [1, 3, 800], ids="{} rows".format)
@pytest.mark.parametrize("layout", ["0+60", "1+130", "4+33"])
def test_compiled_kernels_equal_the_plain_step_for_every_sink_kind(kind: str, rows: int, layout: str) -> None:
    assert largest_difference(150, rows, layout, kind=kind, num_hidden_layers=2) < 5e-5


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("sinks", "window"), [(0, 20), (1, 40), (4, 33)])
def test_replayed_kernels_equal_the_oracle_for_every_sink_kind(
    kind: str, batch_size: int, sinks: int, window: int
) -> None:
    model, tokens = tiny_model(kind=kind), random_tokens(batch_size, 80)
    expected = rotate_everything_stream(model, tokens, sinks, window)
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.bfloat16, 0.3)):
        decoder = StreamingDecoder(
            model.to(DEVICE, dtype), sinks, window, batch_size=batch_size, require_sink=False
        )
        steps = torch.stack([decoder.step(tokens[:, i].to(DEVICE)) for i in range(80)], dim=1).cpu()
        off = (steps.double() - expected).abs()
        print(f"{dtype}: largest difference {off.max():.2g}, mean {off.mean():.2g}")
        assert off.max() < tolerance


def test_a_kind_whose_scale_the_kernels_do_not_know_takes_the_plain_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "has_kernels", lambda _: True)
    model, tokens = model_with_every_part(), torch.zeros(1, dtype=torch.int64)
    assert isinstance(step.make_step(model, RingCache(model, Layout(1, 5), 1), tokens), PlainStep)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_kernels_take_every_kind_and_its_gate_is_what_scales_the_output(kind: str) -> None:
    for layer in tiny_model(kind=kind).gpt_neox.layers:
        assert step.has_gate_or_no_scale(layer)
        sink, x = layer.attention.sink, torch.randn(3, 32, dtype=torch.float64)
        gate, scale = sink.output_gate(), sink.output_scale(x)
        expected = None if gate is None else torch.sigmoid(gate(x))
        torch.testing.assert_close(scale, expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_outside_the_vocabulary_makes_its_row_nan_and_a_reset_heals_it(rows: int) -> None:
    from sinktrain.streaming.fused import FusedStep

    model = tiny_model(dtype=torch.float32, num_hidden_layers=1, **TWO_SMALL_HEADS).to(DEVICE)
    cache = RingCache(model, Layout(1, 5), rows)
    token = torch.full((rows,), 3, device=DEVICE)
    step = FusedStep(model, cache, token, use_pdl=False)
    first = step().clone()
    token[0] = 97
    spoiled = step().clone()
    assert spoiled[0].isnan().all()
    assert not spoiled[1:].isnan().any()
    cache.reset(range(rows))
    token[0] = 3
    torch.testing.assert_close(step(), first)
