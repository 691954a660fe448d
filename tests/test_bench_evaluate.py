"""``sinktrain bench evaluate``: what is counted, what is fed, and what its rows say of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import TINY, tiny_model
from tiny_models import tiny_model as tiny_run_model
from tiny_models import write_run
from torch import Tensor

from sinktrain import cli
from sinktrain.errors import ConfigError
from sinktrain.experiments import bench_evaluate as module
from sinktrain.experiments import machine, scoring
from sinktrain.experiments.bench_evaluate import (
    EvaluateBench,
    EvaluateRow,
    TableRow,
    bench_evaluate,
    evaluate_table,
    stream_shape,
)
from sinktrain.experiments.contenders import OVERFILL_TOKENS, Cell
from sinktrain.experiments.scoring import loss_difference, needed_flops
from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import PYTHIA, ModelConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

CPU = torch.device("cpu")
LAYOUTS = [Layout(1, 15), Layout(0, 16)]
FOUR = [Layout(0, 16), Layout(1, 15), Layout(2, 14), Layout(4, 12)]
Fed = list[tuple[Layout, tuple[int, int]]]


@pytest.fixture
def model() -> GPTNeoX:
    return tiny_model(dtype=torch.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(scoring.STEPPED_TOKENS, "cpu", 3)


def run(model: GPTNeoX, monkeypatch: pytest.MonkeyPatch, **request: Any) -> dict[str, Any]:
    monkeypatch.setattr(module, "timed_models", lambda *_: iter([("tiny", model)]))
    return bench_evaluate(EvaluateBench(["tiny"], **request))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Fed:
    """The layout, and the shape of the tokens, of every call of ``stream_loss``."""
    seen: Fed = []
    stream_loss = scoring.stream_loss

    def watched(model: GPTNeoX, tokens: Tensor, sinks: int, window: int) -> Tensor:
        seen.append((Layout(sinks, window), tuple(tokens.shape)))
        return stream_loss(model, tokens, sinks, window)

    monkeypatch.setattr(scoring, "stream_loss", watched)
    return seen


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> Fed:
    """The layout, the batch size and the stream position of every step."""
    seen: Fed = []
    step = StreamingDecoder.step

    def watched(decoder: StreamingDecoder, tokens: Tensor) -> Tensor:
        seen.append((decoder.layout, (len(tokens), int(decoder.stream_pos[0]))))
        return step(decoder, tokens)

    monkeypatch.setattr(StreamingDecoder, "step", watched)
    return seen


# -- the floor ------------------------------------------------------------------------------------


def slow_flops(model: GPTNeoX, layout: Layout, stream_len: int) -> float:
    """Token by token, weight by weight."""
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed_in" not in name]
    total = 0
    for token in range(stream_len):
        seen = [key for key in range(token + 1) if key < layout.sinks or key > token - layout.window]
        total += 2 * sum(weight.numel() for weight in matrices)
        total += 2 * 2 * TINY.num_hidden_layers * TINY.hidden_size * len(seen)
    return total / stream_len


@pytest.mark.parametrize("stream_len", [1, 10, 16, 70])
@pytest.mark.parametrize("layout", [Layout(0, 16), Layout(4, 12)])
def test_needed_operations_equal_a_hand_count(model, layout, stream_len):
    assert needed_flops(model, layout, stream_len) == pytest.approx(
        slow_flops(model, layout, stream_len), rel=1e-12
    )


def test_pythia_160m_at_1_1023_needs_about_285_million_operations_a_token():
    model = empty_model(ModelConfig(PYTHIA["pythia-160m"]))
    by_hand = 2 * (12 * 12 * 768**2 + 50304 * 768) + 4 * 12 * 768 * 1024
    assert needed_flops(model, Layout(1, 1023), 10**9) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand == pytest.approx(285e6, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_a_matrix_product_is_its_operations_over_its_time(dtype, monkeypatch):
    monkeypatch.setattr(machine, "times_ms", lambda act, num_times, *_: [act() is None, 2.0, 4.0])
    assert machine.matmul_flops(CPU, dtype) == 2 * 64**3 / 2e-3


# -- rows -----------------------------------------------------------------------------------------


def test_rows_tell_of_each_layout_and_a_table_of_the_papers_four(model, monkeypatch):
    result = run(model, monkeypatch, layouts=LAYOUTS, num_tokens=1024, num_streams=2)
    assert list(result) == [
        "schema_version",
        "environment",
        "matmul_size",
        "matmul_flops_per_s",
        "rows",
        "tables",
    ]
    json.dumps(result, allow_nan=False)
    for row, layout in zip(result["rows"], LAYOUTS, strict=True):
        assert list(row) == [one.name for one in fields(EvaluateRow)]
        assert (row["preset"], row["device"], row["dtype"]) == ("tiny", "cpu", "float32")
        assert (row["sinks"], row["window"], row["batch"]) == (layout.sinks, layout.window, 2)
        assert row["stream_len"] == 512
        assert row["tokens_per_s"] == 1024 / row["elapsed_s"]
        assert row["flops_per_token"] == needed_flops(model, layout, 512)
        assert row["floor_tokens_per_s"] == result["matmul_flops_per_s"] / row["flops_per_token"]
        assert row["share_of_floor"] == row["tokens_per_s"] / row["floor_tokens_per_s"]
        assert row["ratio_to_step"] == row["tokens_per_s"] / row["step_tokens_per_s"]
        assert row["ratio_to_single_step"] == row["tokens_per_s"] / row["single_step_tokens_per_s"]
        assert min(row["peak_mem_bytes"], row["quarter_peak_mem_bytes"]) > 2**20
        assert row["max_loss_diff"] < 1e-4
        assert row["num_checked"] == 16 + scoring.CHECKED_PAST_FULL
        assert row["note"] == ""
    [table] = result["tables"]
    assert list(table) == [one.name for one in fields(TableRow)]
    assert table["layouts"] == ["0+16", "1+15", "2+14", "4+12"]
    assert (table["batch"], table["stream_len"], table["note"]) == (2, 512, "")
    assert table["tokens_per_s"] == 1024 / table["elapsed_s"]


def test_streams_are_scored_whole_after_a_quarter_that_warms_up_and_one_that_tells_memory(
    model, monkeypatch, scored
):
    run(model, monkeypatch, layouts=LAYOUTS[:1], num_tokens=1024, num_streams=2)
    check = (LAYOUTS[0], (2, 16 + scoring.CHECKED_PAST_FULL + 1))
    row = [(LAYOUTS[0], (2, length)) for length in (128, 128, 512)]
    table = [(layout, (2, length)) for length in (128, 512) for layout in FOUR]
    assert scored == [check, *row, *table]


def test_steps_are_taken_with_the_cache_full_in_as_many_streams_and_in_one(model, monkeypatch, stepped):
    run(model, monkeypatch, layouts=LAYOUTS[:1], num_tokens=1024, num_streams=4)
    checked = [(2, stream_pos) for stream_pos in range(16 + scoring.CHECKED_PAST_FULL)]
    full = 16 + OVERFILL_TOKENS
    timed = [(batch, full + token) for batch in (4, 1) for token in range(2 + 3)]
    assert stepped == [(LAYOUTS[0], of_step) for of_step in checked + timed]


def test_one_stream_is_stepped_once(model, monkeypatch, stepped):
    [row] = run(model, monkeypatch, layouts=LAYOUTS[:1], num_tokens=64, num_streams=1)["rows"]
    assert len(stepped) == 16 + scoring.CHECKED_PAST_FULL + 5
    assert row["ratio_to_single_step"] == row["ratio_to_step"]


def test_a_quarter_that_does_not_fill_the_cache_twice_tells_nothing_of_memory(model, monkeypatch):
    [row] = run(model, monkeypatch, layouts=LAYOUTS[:1], num_tokens=127, num_streams=1)["rows"]
    assert row["quarter_peak_mem_bytes"] is None
    assert row["peak_mem_bytes"] > 2**20


def test_a_cache_too_small_for_the_papers_row_has_no_table(model, monkeypatch):
    result = run(model, monkeypatch, layouts=[Layout(1, 4)], num_tokens=64)
    assert len(result["rows"]) == 1
    assert result["tables"] == []


def test_a_layout_longer_than_the_training_is_timed(model, monkeypatch):
    longer = Layout(1, TINY.max_position_embeddings)
    [row] = run(model, monkeypatch, layouts=[longer], num_tokens=2 * longer.num_slots)["rows"]
    assert row["tokens_per_s"] > 0
    assert row["num_checked"] == scoring.MOST_CHECKED["cpu"]


# -- the check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [8192, 20])
def test_blocks_and_steps_agree_past_the_first_eviction(monkeypatch, most):
    monkeypatch.setitem(scoring.MOST_CHECKED, "cpu", most)
    model = tiny_model(sinks=(90, 91))
    difference, num_checked = loss_difference(Cell("tiny", model, Layout(2, 9), 3))
    assert num_checked == min(most, 11 + scoring.CHECKED_PAST_FULL)
    assert 0 < difference < 1e-12


def test_blocks_that_are_wrong_are_seen(model, monkeypatch):
    stream_loss = scoring.stream_loss

    def wrong(model: GPTNeoX, tokens: Tensor, sinks: int, window: int) -> Tensor:
        return stream_loss(model, tokens, sinks, window + 1)  # one key too many

    monkeypatch.setattr(scoring, "stream_loss", wrong)
    difference, _ = loss_difference(Cell("tiny", model, Layout(1, 9), 1))
    assert difference > 1e-2


# -- how much -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked_streams", "num_tokens", "shape"),
    [
        (0, 6400, (8, 800)),  # as many as there may be
        (0, 200, (3, 66)),  # as many as are four caches long
        (0, 40, (1, 40)),
        (5, 300, (5, 60)),
    ],
)
def test_streams_are_as_many_as_the_tokens_fill(asked_streams, num_tokens, shape):
    request = EvaluateBench(num_tokens=num_tokens, num_streams=asked_streams)
    assert stream_shape(request, 16, num_tokens) == shape


def test_tokens_chosen_by_the_device_fill_at_least_two_caches():
    assert stream_shape(EvaluateBench(num_streams=3), 16, num_tokens=10) == (3, 32)


def test_too_few_tokens_are_refused_before_anything_is_loaded():
    with pytest.raises(
        ConfigError,
        match="--tokens 100 over 4 streams are 25 each, too few for a cache of 16; use --tokens 128 or more",
    ):
        bench_evaluate(EvaluateBench(["none"], layouts=LAYOUTS, num_tokens=100, num_streams=4))


def test_on_the_cpu_as_many_tokens_are_scored_as_take_some_seconds(model, monkeypatch, scored):
    monkeypatch.setattr(scoring, "times_ms", lambda act, *_: [act() or 10.0])  # 16 tokens take 10 ms
    assert module._num_tokens(model, 16) == module.CPU_SECONDS * 100 * 16
    assert scored == [(Layout(0, 16), (1, 16))]


def test_a_device_without_a_clock_is_refused():
    with pytest.raises(ConfigError, match="--device meta: only cpu and cuda are timed; use one of them"):
        bench_evaluate(EvaluateBench(["14m"], device=torch.device("meta")))


def test_what_does_not_fit_into_memory_is_a_note_and_the_rest_is_timed(model, monkeypatch):
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(StreamingDecoder, "step", full)
    result = run(model, monkeypatch, layouts=LAYOUTS[:1], num_tokens=128, num_streams=2)
    [row], [table] = result["rows"], result["tables"]
    assert row["note"] == "; ".join(
        f"{part}: CUDA out of memory." for part in ("check", "steps", "single steps")
    )
    assert row["step_tokens_per_s"] is row["ratio_to_step"] is row["max_loss_diff"] is None
    assert row["tokens_per_s"] > 0
    assert table["tokens_per_s"] > 0

    monkeypatch.setattr(scoring, "stream_loss", full)
    result = run(model, monkeypatch, layouts=LAYOUTS[:1], num_tokens=128, num_streams=2)
    assert result["rows"][0]["tokens_per_s"] is result["rows"][0]["peak_mem_bytes"] is None
    assert result["tables"][0]["tokens_per_s"] is None
    assert "blocks: CUDA out of memory." in evaluate_table(result)
    assert "0+16, 1+15, 2+14, 4+12: table: CUDA out of memory." in evaluate_table(result)


# -- what is printed ------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Iterator[Path]:
    return write_run(tiny_run_model(), tmp_path / "tiny")


def test_the_table_shows_the_rate_the_floor_and_the_ratios(run_folder, capsys):
    command = ["bench", "evaluate", "--model", str(run_folder), "--layouts", "1+15,2+14"]
    assert cli.main([*command, "--tokens", "512", "--streams", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu (")
    assert re.search(r"^floor: .* TFLOP/s, as a product of 64 x 64 matrices takes$", out, re.MULTILINE)
    assert "\ntiny, float32\n" in out
    numbers = r"( +[\d.,]+){7}$"  # a worker that has run other tests may hold 1,000 MB and more
    assert re.search(rf"^1\+15{numbers}", out, re.MULTILINE)
    assert re.search(rf"^2\+14{numbers}", out, re.MULTILINE)
    assert "  1+15: 2 streams of 256 tokens; stepping " in out
    assert re.search(r"blocks and 32 steps differ by \d\.\de-\d\d nats at most", out)
    assert re.search(r"0\+16, 1\+15, 2\+14, 4\+12: [\d,]+ tokens/s .*, 4,000,000 tokens in [\d,.]+ s", out)


def test_a_checkpoint_is_scored_with_the_layout_that_it_streams_with(run_folder):
    result = bench_evaluate(EvaluateBench(model=str(run_folder), num_tokens=64))
    assert [(row["sinks"], row["window"], row["batch"]) for row in result["rows"]] == [(4, 28, 1)]
    assert "1 stream of 64 tokens" in evaluate_table(result)


@pytest.mark.gpu
def test_a_gpu_is_timed():
    small = tiny_model(dtype=torch.bfloat16, hidden_size=64).cuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.MATMUL_SIZE, "cuda", 512)
        result = run(
            small,
            patch,
            layouts=[Layout(1, 63)],
            num_tokens=2**15,
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
        )
    [row] = result["rows"]
    assert row["note"] == ""
    assert row["batch"] == module.MOST_STREAMS["cuda"]
    assert row["num_checked"] == 64 + scoring.CHECKED_PAST_FULL
    assert row["max_loss_diff"] < 0.5
    assert row["quarter_peak_mem_bytes"] <= row["peak_mem_bytes"]
