"""Losses by policy and layout equal those of slow twins, and every row of a table scores the same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from every_kind import MODELS, every_kind
from numpy.typing import NDArray
from oracles import dense_forward, random_tokens, rotate_everything_stream, tiny_model

from sinktrain.errors import DataError
from sinktrain.evaluation.perplexity import (
    Measured,
    Setting,
    cut_streams,
    dense_bytes,
    measure,
    settings_for,
)
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.ring import RingCache

SLOTS = 8
LAYOUTS = [Layout(sinks, SLOTS - sinks) for sinks in (0, 1, 2, 4)]
SINKS = [(), (90,), (90, 91)]
STREAMS = random_tokens(2, 3 * SLOTS + 5).numpy()

Floats = NDArray[np.float64]


def losses_of(logits: Callable[[torch.Tensor], torch.Tensor], sinks: Sequence[int]) -> Floats:
    """Losses of all text tokens but the first, from the logits of the whole stream with its sinks."""
    tokens = torch.cat((torch.tensor([sinks] * len(STREAMS)).long(), torch.from_numpy(STREAMS)), dim=1)
    log_probabilities = logits(tokens).log_softmax(dim=-1)[:, :-1]
    losses = -log_probabilities.gather(2, tokens[:, 1:, None]).squeeze(2)
    return losses[:, len(sinks) :].numpy()


def measured(model: GPTNeoX, settings: list[Setting], first_scored: int = SLOTS) -> list[Measured]:
    return list(measure(model, STREAMS, settings, first_scored))


def decode(model: GPTNeoX, layout: Layout) -> Callable[[torch.Tensor], torch.Tensor]:
    decoder = StreamingDecoder(model, layout.sinks, layout.window, batch_size=len(STREAMS))
    return lambda tokens: torch.stack([decoder.step(column) for column in tokens.T], dim=1)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(which, marks=() if name in ("token", "kv_bias") else pytest.mark.slow, id=name)
        for name, which in MODELS.items()
    ],
)
def test_streaming_rows_equal_decoding_token_by_token(which: dict[str, Any]) -> None:
    model = tiny_model(**which)
    rows = measured(model, settings_for(("streaming",), LAYOUTS, 0))
    assert [row.setting.layout for row in rows] == LAYOUTS
    for row in rows:
        expected = losses_of(decode(model, row.setting.layout), model.sink_ids)
        np.testing.assert_allclose(row.losses[:, 1:], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(which, marks=() if name in ("none", "two tokens") else pytest.mark.slow, id=name)
        for name, which in MODELS.items()
    ],
)
def test_streaming_rows_equal_the_authors_algorithm(which: dict[str, Any]) -> None:
    model = tiny_model(**which)
    for row in measured(model, settings_for(("streaming",), LAYOUTS, 0)):
        layout = row.setting.layout
        expected = losses_of(
            lambda tokens, at=layout: rotate_everything_stream(model, tokens, at.sinks, at.window),
            model.sink_ids,
        )
        np.testing.assert_allclose(row.losses[:, 1:], expected, rtol=0, atol=1e-10)


@every_kind
def test_dense_equals_the_plain_causal_forward(which: dict[str, Any]) -> None:
    model = tiny_model(**which)
    settings = settings_for(("dense",), LAYOUTS, STREAMS.shape[1] + len(model.sink_ids))
    (row,) = measured(model, settings)
    np.testing.assert_allclose(row.losses[:, 1:], losses_of(model, model.sink_ids), rtol=0, atol=1e-10)
    by_hand = losses_of(lambda tokens: dense_forward(model, tokens), model.sink_ids)
    np.testing.assert_allclose(row.losses[:, 1:], by_hand, rtol=0, atol=1e-10)


def test_every_row_of_every_arm_scores_the_tokens_from_the_first_scored_on() -> None:
    for sinks in SINKS:
        stream_len = STREAMS.shape[1] + len(sinks)
        rows = measured(tiny_model(sinks=sinks), settings_for(("streaming", "dense"), LAYOUTS, stream_len))
        assert len(rows) == 5
        for row in rows:
            assert np.isnan(row.scored[:, :SLOTS]).all()
            assert np.isfinite(row.scored[:, SLOTS:]).all()
            assert np.array_equal(row.scored[:, SLOTS:], row.losses[:, SLOTS:])
            assert row.first_pos == len(sinks)


@pytest.mark.parametrize("sinks", SINKS, ids=str)
def test_first_text_token_is_never_scored_even_where_a_sink_predicts_it(sinks: tuple[int, ...]) -> None:
    (row,) = measured(tiny_model(sinks=sinks), [Setting("streaming", LAYOUTS[1])], first_scored=0)
    assert np.isnan(row.scored[:, 0]).all()
    assert np.isfinite(row.scored[:, 1:]).all()


def test_streams_of_one_text_do_not_see_each_other() -> None:
    model = tiny_model(sinks=(90,))
    (row,) = measured(model, [Setting("streaming", LAYOUTS[1])])
    (alone,) = measure(model, STREAMS[1:], [Setting("streaming", LAYOUTS[1])], SLOTS)
    np.testing.assert_allclose(row.losses[1:, 1:], alone.losses[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("num_tokens", "num_streams", "shape"),
    [
        (640, 8, (8, 80)),
        (645, 8, (8, 80)),  # what does not fill a stream is left out
        (255, 8, (7, 36)),  # streams of at least four windows
        (63, 8, (1, 63)),
        (10, 8, (1, 10)),
        (640, 1, (1, 640)),
    ],
)
def test_a_text_is_cut_into_streams_of_four_windows_or_more(
    num_tokens: int, num_streams: int, shape: tuple[int, int]
) -> None:
    text = np.arange(num_tokens)
    streams = cut_streams(text, num_streams, SLOTS)
    assert streams.shape == shape
    assert np.array_equal(streams.ravel(), text[: streams.size])


def test_a_text_without_a_token_to_score_is_refused() -> None:
    expected = (
        r"there are 9 tokens of text and scoring starts after 8; "
        r"use a longer text, a larger --max-tokens or smaller --layouts"
    )
    with pytest.raises(DataError, match=f"^{expected}$"):
        cut_streams(np.arange(9), 4, SLOTS)


def test_policies_choose_the_rows() -> None:
    streaming = [Setting("streaming", layout) for layout in LAYOUTS]
    dense = Setting("dense", Layout(0, 40))
    assert settings_for(("streaming", "dense"), LAYOUTS, 40) == [*streaming, dense]
    assert settings_for(("streaming",), LAYOUTS, 40) == streaming
    assert settings_for(("dense",), LAYOUTS, 40) == [dense]


@pytest.mark.parametrize(
    ("dtype", "rotary_pct"), list(itertools.product([torch.float32, torch.bfloat16], [0.25, 1.0]))
)
def test_dense_bytes_are_those_of_its_cache(dtype: torch.dtype, rotary_pct: float) -> None:
    model = tiny_model(dtype=dtype, rotary_pct=rotary_pct)
    assert dense_bytes(model, 3, 50) == RingCache(model, Layout(0, 50), batch_size=3).num_bytes
