"""The Triton kernels of a step against the plain step: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import random_tokens, tiny_model

from sinktrain.streaming.blocks import advance
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.plain import PlainStep
from sinktrain.streaming.ring import RingCache

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def largest_difference(
    num_fed: int,
    rows: int = 1,
    layout: str = "1+70",
    spare: int = 0,
    restart: int | None = None,
    **sizes: Any,
) -> float:
    """Between two fused and two plain steps after ``num_fed`` tokens, in logits, keys, values and ages."""
    from sinktrain.streaming.fused import FusedStep

    model = tiny_model(dtype=torch.float32, num_hidden_layers=1, **sizes).to(DEVICE)
    tokens = random_tokens(rows, num_fed + 2).to(DEVICE)
    plain, fused = (RingCache(model, Layout.parse(layout), rows, 7, spare) for _ in range(2))
    for cache in (plain, fused):
        if num_fed:
            list(advance(model, tokens[:, :num_fed], cache))
        if restart is not None:
            cache.reset([restart])
    token = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    steps = PlainStep(model, plain, token), FusedStep(model, fused, token, use_pdl=False)
    worst = 0.0
    for index in range(2):
        token.copy_(tokens[:, num_fed + index])
        logits = [step() for step in steps]
        for cache in (plain, fused):
            cache.shift_bounds(1)
        pairs = [logits, [plain.keys, fused.keys], [plain.values, fused.values]]
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
        assert torch.equal(plain.age, fused.age)
        assert torch.equal(plain.tokens, fused.tokens)
    return worst


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("num_fed", [0, 1, 40, 300])
def test_kernels_equal_the_plain_step_before_and_after_the_ring_wraps(num_fed: int, rows: int) -> None:
    assert largest_difference(num_fed, rows) < 2e-5


@pytest.mark.parametrize("layout", ["0+20", "4+33", "2+1", "40+30"])
def test_kernels_equal_the_plain_step_for_layouts_with_no_sink_and_with_many(layout: str) -> None:
    assert largest_difference(100, layout=layout) < 2e-5


@pytest.mark.parametrize("rows", [1, 2])
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
        {"hidden_size": 256, "num_attention_heads": 1},
    ],
    ids=str,
)
def test_kernels_equal_the_plain_step_for_every_kind_of_network(sizes: dict[str, Any], rows: int) -> None:
    assert largest_difference(80, rows, "1+40", **sizes) < 5e-5


def test_kernels_equal_the_plain_step_with_spare_slots_and_rows_of_mixed_ages() -> None:
    assert largest_difference(90, rows=3, layout="2+31", spare=5, restart=1) < 2e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_outside_the_vocabulary_makes_its_row_nan_and_a_reset_heals_it(rows: int) -> None:
    from sinktrain.streaming.fused import FusedStep

    model = tiny_model(dtype=torch.float32, num_hidden_layers=1).to(DEVICE)
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
