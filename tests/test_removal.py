"""What first tokens are worth: by arithmetic on built models, and against slow twins on random ones."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from every_kind import every_kind
from known_models import LOSS_WITH_SINK, LOSS_WITHOUT_SINK, RARE, sink_seeker
from numpy.typing import NDArray
from oracles import dense_forward, gathered_stream, random_tokens, tiny_model

from sinktrain.evaluation import removal as removal_module
from sinktrain.evaluation.perplexity import Setting, measure
from sinktrain.evaluation.removal import removal_rows
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.layout import Layout

LENGTH = 24
NEWLINE = 7
LAYOUTS = [Layout(sinks, 12 - sinks) for sinks in (0, 1, 2, 4)] + [Layout(1, 5), Layout(4, 2)]
FIRST_SCORED = 12
STREAMS = random_tokens(3, 60).numpy()

Floats = NDArray[np.float64]


def with_front(model: GPTNeoX, texts: NDArray[np.int64]) -> torch.Tensor:
    return torch.tensor([[*model.sink_ids, *row] for row in texts.tolist()])


def last_losses(logits: torch.Tensor, tokens: torch.Tensor, num_scored: int) -> Floats:
    losses = -logits.log_softmax(dim=-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    return losses[:, -num_scored:].numpy()


def only(rows: list[dict[str, Any]], test: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["test"] == test]


# -- known answers ----------------------------------------------------------------------------------


def text_without_rare() -> NDArray[np.int64]:
    return 1 + random_tokens(2, 200).numpy() % 89


@pytest.mark.parametrize("sinks", [(90,), (90, 91)], ids=str)
def test_a_model_that_leans_on_its_sink_loses_what_arithmetic_says(sinks: tuple[int, ...]) -> None:
    assert RARE not in text_without_rare()
    layouts = [Layout(count, 16 - count) for count in (0, 1, 2, 4)]
    rows = removal_rows(sink_seeker(sinks), text_without_rare(), layouts, [NEWLINE])
    kept = sorted({len(sinks), 4})
    assert [(row["test"], row["num_tokens"]) for row in rows] == [
        ("removed", len(sinks)),
        *(("replaced", number) for number in kept),
    ]
    for row in rows:
        assert row["loss_nats"] == pytest.approx(LOSS_WITH_SINK, abs=1e-10)
        assert row["changed_loss_nats"] == pytest.approx(LOSS_WITHOUT_SINK, abs=1e-10)
        assert row["delta_nats"] == pytest.approx(LOSS_WITHOUT_SINK - LOSS_WITH_SINK, abs=1e-10)
        assert row["ci95"] == pytest.approx(2 * [LOSS_WITHOUT_SINK - LOSS_WITH_SINK], abs=1e-10)
        assert row["p"] < 0.01


def test_a_model_that_any_first_token_serves_loses_nothing() -> None:
    """Even attention over tokens that look alike."""
    layouts = [Layout(count, 16 - count) for count in (0, 1, 2, 4)]
    rows = removal_rows(sink_seeker(sinks=()), text_without_rare(), layouts, [NEWLINE])
    assert [(row["test"], row["num_tokens"]) for row in rows] == [
        ("removed", 1),
        ("replaced", 1),
        ("replaced", 4),
    ]
    for row in rows:
        assert row["loss_nats"] == pytest.approx(LOSS_WITHOUT_SINK, abs=1e-10)
        assert row["delta_nats"] == pytest.approx(0, abs=1e-10)


# -- slow twins -------------------------------------------------------------------------------------


@every_kind
def test_removed_equals_the_plain_forward_with_and_without_first_tokens(which: dict[str, Any]) -> None:
    model = tiny_model(**which, max_position_embeddings=LENGTH)
    windows = STREAMS[:, : 2 * LENGTH].reshape(-1, LENGTH)[:, : LENGTH - len(model.sink_ids)]
    tokens = with_front(model, windows)
    num_removed = max(1, len(model.sink_ids))
    shorter = tokens[:, num_removed:]
    num_scored = windows.shape[1] - 8
    as_it_is = last_losses(dense_forward(model, tokens), tokens, num_scored)
    changed = last_losses(dense_forward(model, shorter), shorter, num_scored)
    (row,) = only(removal_rows(model, STREAMS, [], []), "removed")
    assert row["loss_nats"] == pytest.approx(as_it_is.mean(), abs=1e-10)
    assert row["changed_loss_nats"] == pytest.approx(changed.mean(), abs=1e-10)
    assert row["delta_nats"] == pytest.approx((changed - as_it_is).mean(), abs=1e-10)
    assert row["ci95"][0] < row["delta_nats"] < row["ci95"][1]
    assert abs(row["delta_nats"]) > 1e-4
    assert (row["policy"], row["sinks"], row["window"]) == ("dense", 0, LENGTH)
    assert (row["num_tokens"], row["tokens_scored"]) == (num_removed, windows.shape[0] * num_scored)


@every_kind
def test_replaced_equals_the_authors_algorithm_on_a_stream_with_line_breaks(which: dict[str, Any]) -> None:
    model = tiny_model(**which, max_position_embeddings=LENGTH)
    tokens = with_front(model, STREAMS)
    num_scored = STREAMS.shape[1] - FIRST_SCORED
    rows = only(removal_rows(model, STREAMS, LAYOUTS, [NEWLINE, 8]), "replaced")
    needed = max(1, len(model.sink_ids))
    expected_layouts = [layout for layout in LAYOUTS if layout.sinks in (needed, 4)]
    assert [Layout(row["sinks"], row["window"]) for row in rows] == expected_layouts
    for row in rows:
        changed_tokens = tokens.clone()
        changed_tokens[:, : row["sinks"]] = NEWLINE
        as_it_is, changed = (
            last_losses(gathered_stream(model, read, row["sinks"], row["window"]), read, num_scored)
            for read in (tokens, changed_tokens)
        )
        assert row["loss_nats"] == pytest.approx(as_it_is.mean(), abs=1e-10)
        assert row["changed_loss_nats"] == pytest.approx(changed.mean(), abs=1e-10)
        assert row["delta_nats"] == pytest.approx((changed - as_it_is).mean(), abs=1e-10)
        assert abs(row["delta_nats"]) > 1e-4
        assert (row["policy"], row["num_tokens"]) == ("streaming", row["sinks"])
        assert row["tokens_scored"] == len(STREAMS) * num_scored


def test_replaced_as_it_is_equals_the_table() -> None:
    model = tiny_model(sinks=(90,), max_position_embeddings=LENGTH)
    row = only(removal_rows(model, STREAMS, LAYOUTS, [NEWLINE]), "replaced")[0]
    setting = Setting("streaming", Layout(row["sinks"], row["window"]))
    (measured,) = measure(model, STREAMS, [setting], FIRST_SCORED)
    assert row["loss_nats"] == pytest.approx(np.nanmean(measured.scored), abs=1e-12)
    assert row["tokens_scored"] == np.count_nonzero(~np.isnan(measured.scored))


# -- what is read and scored ------------------------------------------------------------------------


@every_kind
def test_both_readings_score_the_same_tokens(monkeypatch: pytest.MonkeyPatch, which: dict[str, Any]) -> None:
    read: list[torch.Tensor] = []

    def reading(model: GPTNeoX, tokens: torch.Tensor, *layout: int, require_sink: bool) -> torch.Tensor:
        read.append(tokens)
        return torch.zeros(tokens.shape[0], tokens.shape[1] - 1) + len(read)

    monkeypatch.setattr(removal_module, "stream_loss", reading)
    model = tiny_model(**which, max_position_embeddings=LENGTH)
    rows = removal_rows(model, STREAMS, LAYOUTS, [NEWLINE])
    assert len(read) == 2 * len(rows)
    for row, as_it_is, changed in zip(rows, read[::2], read[1::2], strict=True):
        num_scored = row["tokens_scored"] // len(as_it_is)
        assert torch.equal(as_it_is[:, -num_scored:], changed[:, -num_scored:])
        assert as_it_is.shape[1] - num_scored >= (8 if row["test"] == "removed" else FIRST_SCORED)
        assert row["delta_nats"] == 1


def test_no_more_tokens_are_read_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = random_tokens(10, 500).numpy()
    shapes: list[tuple[int, ...]] = []
    stream_loss = removal_module.stream_loss

    def counting(model: GPTNeoX, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return stream_loss(model, tokens, *args, **options)

    monkeypatch.setattr(removal_module, "stream_loss", counting)
    model = tiny_model(max_position_embeddings=LENGTH)
    removal_rows(model, streams, [Layout(1, 11)], [NEWLINE], max_tokens=100)
    assert shapes == [(4, 24), (4, 23), (4, 25), (4, 25)]
    shapes.clear()
    removal_rows(model, streams, [Layout(1, 11)], [NEWLINE], max_tokens=5)
    assert shapes == [(1, 24), (1, 23), (1, 24), (1, 24)]


def test_reading_in_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(sinks=(90,), max_position_embeddings=LENGTH)
    whole = removal_rows(model, STREAMS, LAYOUTS, [NEWLINE])
    monkeypatch.setattr(removal_module, "TOKENS_AT_ONCE", 1)
    for row, other in zip(removal_rows(model, STREAMS, LAYOUTS, [NEWLINE]), whole, strict=True):
        assert row["loss_nats"] == pytest.approx(other["loss_nats"], abs=1e-12)
        assert row["delta_nats"] == pytest.approx(other["delta_nats"], abs=1e-12)


def test_rows_can_be_written_even_if_the_text_holds_a_sink() -> None:
    streams = STREAMS.copy()
    streams[0, 30] = 90
    rows = removal_rows(tiny_model(sinks=(90,), max_position_embeddings=LENGTH), streams, LAYOUTS, [NEWLINE])
    json.dumps(rows, allow_nan=False)
    assert rows[1]["tokens_scored"] == len(STREAMS) * (STREAMS.shape[1] - FIRST_SCORED) - 1
    assert all(math.isfinite(row["delta_nats"]) for row in rows)


@pytest.mark.parametrize("stream_len", [3, 8, 9, 12, 13])
def test_streams_too_short_to_score_give_no_rows(stream_len: int) -> None:
    model = tiny_model(sinks=(90,), max_position_embeddings=LENGTH)
    assert removal_rows(model, STREAMS[:, :stream_len], LAYOUTS, [NEWLINE]) == []


def test_without_a_line_break_or_layouts_that_keep_tokens_nothing_is_replaced() -> None:
    model = tiny_model(max_position_embeddings=LENGTH)
    for layouts, newline_ids in ([LAYOUTS, []], [[Layout(0, 12)], [NEWLINE]], [[], [NEWLINE]]):
        assert [row["test"] for row in removal_rows(model, STREAMS, layouts, newline_ids)] == ["removed"]
