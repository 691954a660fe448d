"""Latency: the rows of results.json, and that what they say is what was stepped."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from every_kind import every_kind
from hypothesis import given
from hypothesis import strategies as st
from oracles import TINY, tiny_model
from torch import Tensor

from sinktrain.errors import ConfigError
from sinktrain.evaluation import latency as module
from sinktrain.evaluation import timing
from sinktrain.evaluation.latency import POLICIES, latency, stream_positions, with_positions
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

CPU = torch.device("cpu")
LAYOUTS = [Layout(0, 16), Layout(1, 15), Layout(2, 14), Layout(4, 28)]
BYTES_PER_TOKEN = 2 * TINY.num_hidden_layers * TINY.hidden_size * 4
FIELDS = [
    "policy",
    "sinks",
    "window",
    "batch",
    "stream_pos",
    "ms_per_token_p50",
    "ms_per_token_p95",
    "peak_mem_bytes",
    "cache_bytes",
    "device",
]
Row = dict[str, Any]


@pytest.fixture
def model() -> GPTNeoX:
    return tiny_model(dtype=torch.float32)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST_TOKENS", {"cpu": 2, "cuda": 2})


def of(rows: list[Row], policy: str, num_slots: int | None = None) -> list[Row]:
    return [
        row for row in rows if row["policy"] == policy and num_slots in (None, row["sinks"] + row["window"])
    ]


def positions(rows: list[Row]) -> list[int]:
    return [row["stream_pos"] for row in rows]


# -- rows -----------------------------------------------------------------------------------------


def test_rows_have_the_fields_of_results_json_but_the_model(model):
    rows = latency(model, LAYOUTS, POLICIES)
    for row in rows:
        assert list(row) == FIELDS
        assert row["batch"] == 1
        assert 0 < row["ms_per_token_p50"] <= row["ms_per_token_p95"]
        assert row["peak_mem_bytes"] > 2**20
        assert row["device"] == timing.device_name(CPU)


def test_streaming_is_timed_once_for_each_total_up_to_four_of_the_largest(model):
    rows = latency(model, LAYOUTS, ["streaming"])
    assert positions(of(rows, "streaming", 16)) == positions(of(rows, "streaming", 32)) == [16, 32, 64, 128]
    assert len(rows) == 8
    assert {row["cache_bytes"] for row in of(rows, "streaming", 16)} == {16 * BYTES_PER_TOKEN}


@pytest.mark.parametrize(("own", "timed"), [((), 1), ((90,), 1), ((90, 91), 2), ((90, 91, 92), 2)])
def test_the_layout_timed_keeps_the_sinks_that_the_model_needs_or_about_that(own, timed):
    model = tiny_model(sinks=own, dtype=torch.float32)
    rows = latency(model, LAYOUTS[:3], ["streaming"], max_stream_len=8)
    assert [(row["sinks"], row["window"]) for row in rows] == [(timed, 16 - timed)]


def test_the_dense_cache_holds_as_many_tokens_as_the_stream_has(model):
    rows = latency(model, LAYOUTS, ["dense"], max_stream_len=100)
    assert [(row["sinks"], row["window"]) for row in rows] == [(0, 16), (0, 32), (0, 100)]
    for row in rows:
        assert row["stream_pos"] == row["window"]
        assert row["cache_bytes"] == row["stream_pos"] * BYTES_PER_TOKEN


def test_recompute_keeps_nothing_and_is_timed_while_its_window_fills_and_at_the_end():
    model = tiny_model(sinks=(90, 91), dtype=torch.float32)
    rows = latency(model, LAYOUTS, ["recompute"])
    assert {(row["sinks"], row["window"]) for row in rows} == {(2, 14), (2, 30)}
    assert positions(of(rows, "recompute", 16)) == [16, 128]
    assert positions(of(rows, "recompute", 32)) == [16, 32, 128]
    assert {row["cache_bytes"] for row in rows} == {None}


def test_p50_and_p95_are_over_single_tokens(model, monkeypatch):
    times = iter([[7.0], [7.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # two to warm up, three bursts
    monkeypatch.setattr(module, "times_ms", lambda *_: next(times))
    [row] = latency(model, LAYOUTS[:1], ["streaming"], max_stream_len=8)
    assert (row["ms_per_token_p50"], row["ms_per_token_p95"]) == (3.5, 5.75)
    assert next(times, None) is None


# -- what is timed --------------------------------------------------------------------------------


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Layout, int]]:
    """The layout, and the stream position, of every token that a decoder was stepped with."""
    seen: list[tuple[Layout, int]] = []
    step = StreamingDecoder.step

    def watched(decoder: StreamingDecoder, tokens: Tensor) -> Tensor:
        seen.append((decoder.layout, int(decoder.stream_pos[0])))
        return step(decoder, tokens)

    monkeypatch.setattr(StreamingDecoder, "step", watched)
    return seen


def warm_up_and_timed(layout: Layout, stream_pos: int) -> list[tuple[Layout, int]]:
    return [(layout, stream_pos + token) for token in range(2 + module.NUM_BURSTS * 2)]


def test_streaming_steps_one_stream_from_each_position_on(model, stepped):
    latency(model, LAYOUTS[1:2], ["streaming"], max_stream_len=64)
    assert stepped == [
        stepped_at
        for stream_pos in (8, 16, 32, 64)
        for stepped_at in warm_up_and_timed(LAYOUTS[1], stream_pos)
    ]


def test_dense_steps_see_as_many_tokens_as_the_stream_has(model, stepped):
    latency(model, LAYOUTS[1:2], ["dense"], max_stream_len=64)
    assert stepped == [
        stepped_at
        for stream_pos in (8, 16, 32, 64)
        for stepped_at in warm_up_and_timed(Layout(0, stream_pos), stream_pos)
    ]


def test_recompute_runs_the_newest_n_tokens_through_the_model_for_each_token(model, monkeypatch):
    lengths: list[int] = []
    hidden = GPTNeoX.hidden

    def watched(self: GPTNeoX, tokens: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, attend)

    monkeypatch.setattr(GPTNeoX, "hidden", watched)
    latency(model, LAYOUTS[1:2], ["recompute"])
    assert lengths == [8] * 8 + [16] * 8 + [16] * 8  # positions 8, 16 and 64


@every_kind
def test_streams_of_every_kind_are_timed(which):
    rows = latency(tiny_model(**which, dtype=torch.float32), LAYOUTS[1:2], POLICIES, max_stream_len=16)
    assert {row["policy"] for row in rows} == set(POLICIES)
    assert {row["cache_bytes"] for row in of(rows, "streaming")} == {16 * BYTES_PER_TOKEN}


@every_kind
def test_a_recomputed_token_has_the_logits_of_the_dense_model(which):
    model = tiny_model(**which, dtype=torch.float32)
    stream = module._recompute(model, Layout(1, 15), 40)
    expected = model(module._random_tokens(model, 16))[:, -1]
    torch.testing.assert_close(stream.step(), expected, rtol=0, atol=1e-5)


def test_no_stream_is_held_while_another_is_timed(model, monkeypatch):
    made: list[weakref.ref[StreamingDecoder]] = []
    held: list[int] = []
    make, recompute = StreamingDecoder.__init__, module._recompute

    def watched(decoder: StreamingDecoder, *arguments: Any, **options: Any) -> None:
        held.append(sum(one() is not None for one in made))
        made.append(weakref.ref(decoder))
        make(decoder, *arguments, **options)

    def last(*arguments: Any) -> module.Stream:
        held.append(sum(one() is not None for one in made))
        return recompute(*arguments)

    monkeypatch.setattr(StreamingDecoder, "__init__", watched)
    monkeypatch.setattr(module, "_recompute", last)
    latency(model, LAYOUTS[1:2], POLICIES, max_stream_len=16)
    assert len(made) == 3  # one that streams, two dense
    assert held == [0] * 5


def test_streams_may_be_longer_than_those_of_the_training(model):
    trained = TINY.max_position_embeddings
    rows = latency(model, [Layout(1, trained)], ["streaming", "dense"], max_stream_len=2 * trained + 2)
    assert positions(of(rows, "dense")) == positions(of(rows, "streaming")) == [64, 128, 256, 514]
    assert model.config.network.max_position_embeddings == trained


def test_more_positions_take_no_more_weights(model):
    longer = with_positions(model, 1000)
    assert longer.config.network.max_position_embeddings == 1000
    assert longer.embed_out.weight is model.embed_out.weight
    assert with_positions(model, 256) is model


@given(num_slots=st.integers(1, 5000), last=st.integers(1, 20000))
def test_positions_rise_at_least_twofold_to_the_last(num_slots, last):
    found = stream_positions(num_slots, last)
    assert found[-1] == last
    assert all(2 * before <= after for before, after in pairwise(found))


# -- limits ---------------------------------------------------------------------------------------


def test_what_takes_too_long_is_left_out_and_told(model, capsys):
    rows = latency(model, LAYOUTS[:2], POLICIES, budget_s=1e-9)
    assert [(row["policy"], row["stream_pos"]) for row in rows] == [(policy, 8) for policy in POLICIES]
    said = capsys.readouterr().err
    assert "latency: streaming 1+15 left out from stream position 16 on: its share of the time is 0 s" in said
    assert "latency: dense left out from stream position 16 on" in said
    assert "latency: recompute 0+16 left out from stream position 16 on" in said


def test_what_does_not_fit_into_memory_is_left_out_and_told(model, capsys, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda _: 2 * 16 * BYTES_PER_TOKEN)
    rows = latency(model, LAYOUTS[:2], ["dense", "streaming"])
    assert positions(of(rows, "dense")) == [8, 16]
    assert positions(of(rows, "streaming")) == [8, 16, 32, 64]
    assert "latency: dense left out from stream position 32 on: the cache takes 0.0 GiB" in (
        capsys.readouterr().err
    )


def test_a_device_that_is_full_leaves_the_other_rows(model, capsys, monkeypatch):
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(StreamingDecoder, "step", full)
    rows = latency(model, LAYOUTS[:1], POLICIES)
    assert {row["policy"] for row in rows} == {"recompute"}
    assert "latency: streaming 0+16 left out from stream position 8 on: CUDA out of memory." in (
        capsys.readouterr().err.splitlines()
    )


@pytest.mark.parametrize(
    ("layouts", "policies", "max_stream_len", "message"),
    [
        (LAYOUTS, ["sparse"], None, 'no policy "sparse"; there are streaming, dense, recompute'),
        ([], ["dense"], None, "latency of 1 policies and 0 layouts up to stream position None is nothing"),
        (LAYOUTS, [], None, "latency of 0 policies and 4 layouts up to stream position None is nothing"),
        (LAYOUTS, ["dense"], 0, "latency of 1 policies and 4 layouts up to stream position 0 is nothing"),
    ],
)
def test_nothing_to_time_is_refused(model, layouts, policies, max_stream_len, message):
    with pytest.raises(ConfigError, match=message):
        latency(model, layouts, policies, max_stream_len)


def test_a_device_without_a_clock_is_refused():
    with pytest.raises(ConfigError, match="--device meta: only cpu and cuda are timed; use one of them"):
        latency(tiny_model().to("meta"), LAYOUTS, POLICIES)


# -- clock and memory -----------------------------------------------------------------------------


def test_each_call_has_its_time():
    calls: list[str] = []
    times = timing.times_ms(lambda: calls.append("act"), 3, CPU, lambda: calls.append("after"))
    assert len(times) == 3
    assert calls == ["act", "after"] * 3


def test_memory_that_is_left_is_no_more_than_the_system_has(monkeypatch):
    if not Path("/proc/meminfo").exists():
        pytest.skip("only Linux tells")
    assert 2**20 < timing.free_bytes(CPU) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(timing, "Path", lambda _: Path("/nowhere"))
    assert timing.free_bytes(CPU) == sys.maxsize


@pytest.mark.gpu
def test_a_gpu_is_timed_with_every_policy():
    model = tiny_model(sinks=(90,), dtype=torch.bfloat16, hidden_size=64).cuda()
    rows = latency(model, [Layout(1, 63), Layout(2, 62)], POLICIES)
    assert positions(of(rows, "streaming")) == positions(of(rows, "dense")) == [32, 64, 128, 256]
    assert positions(of(rows, "recompute")) == [32, 64, 256]
    for row in rows:
        assert row["device"].startswith("cuda (")
        assert 0 < row["ms_per_token_p50"] <= row["ms_per_token_p95"]
        assert row["peak_mem_bytes"] >= (row["cache_bytes"] or 0)
