"""Recomputed losses equal a plain forward per token, and what is scored is spread over the text in runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from every_kind import every_kind
from numpy.typing import NDArray
from oracles import random_tokens, tiny_model

from sinktrain.errors import StreamError
from sinktrain.evaluation import recompute
from sinktrain.evaluation.recompute import MIN_RUN_TOKENS, recompute_losses, spread_runs
from sinktrain.evaluation.statistics import NUM_BLOCKS, block_sums
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import stream_loss

SLOTS = 8
STREAMS = random_tokens(2, 3 * SLOTS + 5).numpy()
ALL = STREAMS.size

Floats = NDArray[np.float64]


def one_by_one(model: GPTNeoX, streams: NDArray[np.int64], num_slots: int, first_scored: int) -> Floats:
    """A forward of its own for each token, whose window is a list."""
    losses = np.full(streams.shape, np.nan)
    for stream, text in enumerate(streams.tolist()):
        for token in range(first_scored, len(text)):
            kept = text[max(0, token - (num_slots - len(model.sink_ids))) : token]
            logits = model(torch.tensor([model.sink_ids + kept]))[0, -1]
            losses[stream, token] = -logits.log_softmax(dim=0)[text[token]]
    return losses


@pytest.mark.parametrize("first_scored", [1, SLOTS])
@every_kind
def test_recompute_equals_a_plain_forward_per_token(which: dict[str, Any], first_scored: int) -> None:
    model = tiny_model(**which)
    losses = recompute_losses(model, STREAMS, SLOTS, first_scored, ALL)
    np.testing.assert_allclose(losses, one_by_one(model, STREAMS, SLOTS, first_scored), rtol=0, atol=1e-12)


@every_kind
def test_a_window_of_one_text_token_still_predicts(which: dict[str, Any]) -> None:
    model = tiny_model(**which)
    num_slots = len(model.sink_ids) + 1
    losses = recompute_losses(model, STREAMS, num_slots, 1, ALL)
    np.testing.assert_allclose(losses, one_by_one(model, STREAMS, num_slots, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1, 1000, 10_000])
def test_batches_of_any_size_give_the_same_losses(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    model = tiny_model(sinks=(90,))
    expected = recompute_losses(model, STREAMS, SLOTS, 1, ALL)
    monkeypatch.setattr(recompute, "MAX_CPU_ACTIVATIONS", most)
    np.testing.assert_allclose(recompute_losses(model, STREAMS, SLOTS, 1, ALL), expected, rtol=0, atol=1e-12)


@every_kind
def test_where_the_stream_fits_into_the_window_recompute_dense_and_streaming_are_one(
    which: dict[str, Any],
) -> None:
    model = tiny_model(**which)
    num_sinks = len(model.sink_ids)
    num_slots = num_sinks + STREAMS.shape[1] + 3
    losses = recompute_losses(model, STREAMS, num_slots, 1, ALL)[:, 1:]
    front = torch.tensor([model.sink_ids] * len(STREAMS), dtype=torch.int64)
    tokens = torch.cat((front, torch.from_numpy(STREAMS)), dim=1)
    dense = model(tokens).log_softmax(dim=-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    streaming = stream_loss(model, tokens, max(1, num_sinks), num_slots - max(1, num_sinks))
    np.testing.assert_allclose(losses, -dense[:, num_sinks:].numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(losses, streaming[:, num_sinks:].numpy(), rtol=0, atol=1e-10)


def test_after_the_window_is_full_recompute_is_another_function_than_streaming() -> None:
    model = tiny_model()
    losses = recompute_losses(model, STREAMS, SLOTS, 1, ALL)[:, 1:]
    streaming = stream_loss(model, torch.from_numpy(STREAMS), 0, SLOTS).numpy()
    differences = np.abs(losses - streaming)
    assert differences[:, :SLOTS].max() < 1e-10
    assert differences[:, SLOTS:].min(axis=1).max() > 1e-6


def test_only_the_chosen_tokens_are_scored_and_they_lose_as_much_as_among_all() -> None:
    model = tiny_model(sinks=(90,))
    losses = recompute_losses(model, STREAMS, SLOTS, SLOTS, 11)
    chosen = tuple(spread_runs(STREAMS.shape, SLOTS, 11).T)
    assert np.count_nonzero(~np.isnan(losses)) == len(chosen[0]) == 11
    every = recompute_losses(model, STREAMS, SLOTS, SLOTS, ALL)
    np.testing.assert_allclose(losses[chosen], every[chosen], rtol=0, atol=1e-12)


def test_progress_adds_up_to_the_tokens_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "MAX_CPU_ACTIVATIONS", 10_000)
    steps: list[int] = []
    recompute_losses(tiny_model(), STREAMS, SLOTS, SLOTS, 17, steps.append)
    assert len(steps) > 1
    assert sum(steps) == 17


def test_a_stream_without_a_token_to_score_gives_none() -> None:
    assert np.isnan(recompute_losses(tiny_model(), STREAMS, SLOTS, STREAMS.shape[1], ALL)).all()


def test_no_room_besides_the_sinks_is_one_clear_line() -> None:
    expected = (
        r"recompute over 2 slots has no room for a text token besides the model's 2 sinks; use 3 or more"
    )
    with pytest.raises(StreamError, match=f"^{expected}$"):
        recompute_losses(tiny_model(sinks=(90, 91)), STREAMS, 2, SLOTS, ALL)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_lower_precisions_are_near(dtype: torch.dtype, tolerance: float) -> None:
    exact = recompute_losses(tiny_model(sinks=(90,)), STREAMS, SLOTS, 1, ALL)
    losses = recompute_losses(tiny_model(sinks=(90,), dtype=dtype), STREAMS, SLOTS, 1, ALL)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, exact, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 0.3)]
)
def test_recompute_on_a_gpu_equals_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    exact = recompute_losses(tiny_model(sinks=(90,)), STREAMS, SLOTS, 1, ALL)
    losses = recompute_losses(tiny_model(sinks=(90,), dtype=dtype).cuda(), STREAMS, SLOTS, 1, ALL)
    np.testing.assert_allclose(losses, exact, rtol=0, atol=tolerance)


# -- what is scored -------------------------------------------------------------------------------

SHAPES = [((8, 4096), 512), ((1, 70_000), 64), ((100, 1500), 1024), ((3, 40), 8)]
BUDGETS = [1, 10, 100, 5000, 20_000, 10**9]


def in_text_order(shape: tuple[int, int], first_scored: int, max_tokens: int) -> NDArray[np.int64]:
    """Places of the chosen tokens among all that may be scored."""
    stream, token = spread_runs(shape, first_scored, max_tokens).T
    assert token.min() >= first_scored
    assert token.max() < shape[1]
    return stream * (shape[1] - first_scored) + token - first_scored


@pytest.mark.parametrize("max_tokens", BUDGETS)
@pytest.mark.parametrize(("shape", "first_scored"), SHAPES)
def test_exactly_the_budget_is_scored_each_token_once_from_begin_to_end_of_the_text(
    shape: tuple[int, int], first_scored: int, max_tokens: int
) -> None:
    places = in_text_order(shape, first_scored, max_tokens)
    available = shape[0] * (shape[1] - first_scored)
    assert len(places) == min(max_tokens, available)
    assert (np.diff(places) > 0).all()
    if max_tokens >= NUM_BLOCKS:
        gaps = np.diff(places, prepend=-1, append=available) - 1
        assert gaps.max() <= available / NUM_BLOCKS + 1  # nowhere is much left out


@pytest.mark.parametrize("max_tokens", [5000, 8192, 20_000, 20_001])
@pytest.mark.parametrize(("shape", "first_scored"), SHAPES[:3])
def test_each_block_of_the_statistics_holds_whole_runs_of_neighbours(
    shape: tuple[int, int], first_scored: int, max_tokens: int
) -> None:
    chosen = spread_runs(shape, first_scored, max_tokens)
    scored = np.full(shape, np.nan)
    scored[tuple(chosen.T)] = 1.0
    block_ends = np.cumsum(block_sums(scored)[1]).astype(int)[:-1]
    places = in_text_order(shape, first_scored, max_tokens)
    run_ends = np.flatnonzero(np.diff(places) > 1) + 1
    assert set(block_ends) <= set(run_ends)
    shortest = min(MIN_RUN_TOKENS, max_tokens // NUM_BLOCKS)
    assert np.diff(run_ends, prepend=0, append=len(places)).min() >= shortest
