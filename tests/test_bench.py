"""``sinktrain bench``: peers are right, floors count what they say, rows tell what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import TINY, random_tokens, rotate_everything_stream, tiny_model
from tiny_models import tiny_model as tiny_run_model
from tiny_models import write_run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sinktrain import cli
from sinktrain.errors import ConfigError
from sinktrain.evaluation import timing
from sinktrain.experiments import bench, bench_evaluate, contenders, peers
from sinktrain.experiments.bench import DecodeBench, bench_decode, trace_marks
from sinktrain.experiments.bench_evaluate import EvaluateBench
from sinktrain.experiments.contenders import Cell, Contender, matmuls_contender, step_bytes
from sinktrain.experiments.peers import (
    CatAndRotatePeer,
    DynamicCachePeer,
    Peer,
    RecomputePeer,
    StaticCachePeer,
    as_transformers,
)
from sinktrain.model.config import PYTHIA
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

CLOSE = {"rtol": 0, "atol": 1e-5}  # logits are near 2; transformers' angles are float32
LAYOUT = Layout(1, 15)


def dense(model: GPTNeoX, *parts: Tensor) -> Tensor:
    """Logits after the last of all these tokens: float[batch, vocab]."""
    tokens = torch.cat([part if part.dim() == 2 else part[:, None] for part in parts], dim=1)
    return model(tokens)[:, -1]


@pytest.fixture
def model() -> GPTNeoX:
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tiny_run_model(), tmp_path / "tiny")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_cpp_compiler", lambda: False)


# -- peers are right ------------------------------------------------------------------------------


def test_transformers_holds_our_weights_themselves_and_leaves_them_as_they_were(model):
    ours = dict(model.named_parameters())
    theirs = dict(as_transformers(model).named_parameters())
    theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert {name: weight.data_ptr() for name, weight in theirs.items()} == {
        name: weight.data_ptr() for name, weight in ours.items()
    }
    assert not any(weight.requires_grad for weight in (*ours.values(), *theirs.values()))


def test_the_dynamic_cache_sees_all_slots_at_every_step(model):
    tokens = random_tokens(2, 20)
    peer = DynamicCachePeer(model, LAYOUT, 2)
    prompt = tokens[:, : peer.prompt_len]
    assert prompt.shape[1] + 1 == LAYOUT.num_slots
    torch.testing.assert_close(peer.prefill(prompt), dense(model, prompt), **CLOSE)
    for token in tokens[:, -3:].unbind(1):
        torch.testing.assert_close(peer.step(token), dense(model, prompt, token), **CLOSE)
    assert peer.cache_bytes == 2 * 2 * 2 * 15 * 32 * 4


def test_the_static_cache_is_the_dense_model_until_it_is_full(model, monkeypatch):
    monkeypatch.setattr(peers, "has_cpp_compiler", lambda: True)
    tokens = random_tokens(2, LAYOUT.num_slots)
    peer = StaticCachePeer(model, LAYOUT, 2)
    expected = model(tokens)
    start = peer.prompt_len
    assert start + peer.max_tokens == LAYOUT.num_slots
    torch.testing.assert_close(peer.prefill(tokens[:, :start]), expected[:, start - 1], **CLOSE)
    for seq in range(start, LAYOUT.num_slots):
        torch.testing.assert_close(peer.step(tokens[:, seq]), expected[:, seq], **CLOSE)
    assert peer.cache_bytes == 2 * 2 * 2 * 16 * 32 * 4


@pytest.mark.slow
def test_the_compiled_static_cache_emits_the_most_probable_tokens(model):
    peer = StaticCachePeer(model, LAYOUT, 2)
    prompt = random_tokens(2, peer.prompt_len)
    emitted = [peer.prefill(prompt).argmax(dim=-1)]
    for _ in range(peer.max_tokens):
        emitted.append(peer.next_token(emitted[-1]))
    for count, token in enumerate(emitted):
        assert torch.equal(token, dense(model, prompt, *emitted[:count]).argmax(dim=-1))


def test_recomputation_is_the_dense_model_on_the_newest_tokens(model):
    tokens = random_tokens(2, 18)
    peer = RecomputePeer(model, LAYOUT, 2)
    torch.testing.assert_close(peer.prefill(tokens[:, :16]), dense(model, tokens[:, :16]), **CLOSE)
    torch.testing.assert_close(peer.step(tokens[:, 16]), dense(model, tokens[:, 1:17]), **CLOSE)
    torch.testing.assert_close(peer.step(tokens[:, 17]), dense(model, tokens[:, 2:18]), **CLOSE)
    assert peer.cache_bytes == 0


def test_recomputation_keeps_the_sinks_of_a_model_in_front():
    model = tiny_model(sinks=(90,), dtype=torch.float32)
    tokens = random_tokens(1, 17)
    tokens[:, 0] = 90
    peer = RecomputePeer(model, LAYOUT, 1)
    peer.prefill(tokens[:, :16])
    expected = dense(model, tokens[:, :1], tokens[:, 2:])
    torch.testing.assert_close(peer.step(tokens[:, 16]), expected, **CLOSE)


@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (1, 1), (4, 5)])
def test_cat_and_rotate_equals_the_oracle_after_three_wraps(sinks, window, rotary_pct):
    model, tokens = tiny_model(rotary_pct=rotary_pct), random_tokens(2, sinks + 4 * window + 3)
    peer = CatAndRotatePeer(model, Layout(sinks, window), 2)
    logits = torch.stack([peer.step(token) for token in tokens.unbind(1)], dim=1)
    expected = rotate_everything_stream(model, tokens, sinks, window)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert peer.cache_bytes == 2 * 2 * 2 * (sinks + window - 1) * 32 * 8


def test_cat_and_rotate_goes_on_after_a_prompt_fed_in_blocks(monkeypatch):
    monkeypatch.setattr(peers, "PREFILL_BLOCK", 4)
    model, tokens = tiny_model(), random_tokens(2, 30)
    expected = rotate_everything_stream(model, tokens, 2, 9)
    peer = CatAndRotatePeer(model, Layout(2, 9), 2)
    logits = [peer.prefill(tokens[:, : peer.prompt_len])]
    logits += [peer.step(token) for token in tokens[:, peer.prompt_len :].unbind(1)]
    torch.testing.assert_close(
        torch.stack(logits, dim=1), expected[:, peer.prompt_len - 1 :], rtol=0, atol=1e-12
    )


# -- floors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"attention_bias": False, "intermediate_size": 48}])
def test_the_matrix_products_are_those_of_a_step_and_no_others(changes):
    model = tiny_model(dtype=torch.float32, **changes)
    batch, layout = 3, Layout(1, 6)
    floor = matmuls_contender(Cell("tiny", model, layout, batch))
    with FlopCounterMode(display=False) as counted:
        floor.decode()
    matrices = [
        weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed_in" not in name
    ]
    attention = 2 * 2 * TINY.num_hidden_layers * TINY.hidden_size * layout.num_slots
    expected = batch * (2 * sum(weight.numel() for weight in matrices) + attention)
    assert counted.get_total_flops() == expected
    assert floor.cache_bytes == 2 * TINY.num_hidden_layers * batch * layout.num_slots * TINY.hidden_size * 4


def test_a_step_reads_every_weight_but_the_embedding_and_all_slots():
    model = tiny_model(dtype=torch.bfloat16)
    weights = sum(weight.numel() for weight in model.parameters()) - TINY.vocab_size * TINY.hidden_size
    slots = 2 * TINY.num_hidden_layers * 3 * 7 * TINY.hidden_size
    assert step_bytes(Cell("tiny", model, Layout(1, 6), 3)) == 2 * (weights + slots)


def test_the_floor_of_the_issue_is_met_by_the_formula():
    """Pythia-160m, bf16, 1+1023 at 3.0 TB/s: 0.095 ms for one stream and 0.485 for 32 (design section 6)."""
    with torch.device("meta"):
        model = GPTNeoX(bench.ModelConfig(PYTHIA["pythia-160m"])).to(torch.bfloat16)
    floors = [step_bytes(Cell("160m", model, Layout(1, 1023), batch)) / 3.0e12 * 1e3 for batch in (1, 32)]
    assert floors == pytest.approx([0.0954, 0.485], rel=0.01)


# -- rows -----------------------------------------------------------------------------------------


def test_a_cell_tells_of_our_decoder_its_floor_and_every_peer(model, no_compiler, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    result = bench_decode(DecodeBench(["tiny"], None, [LAYOUT], [2], num_tokens=8, use_peers=True))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "generate",
        "step",
        "matmuls",
        "transformers-dynamic",
        "transformers-static",
        "recompute",
        "cat-and-rotate",
    ]
    for row in result["rows"]:
        cell = (row["preset"], row["device"], row["dtype"], row["sinks"], row["window"], row["batch"])
        assert cell == ("tiny", "cpu", "float32", 1, 15, 2)
    skipped = rows.pop("transformers-static")
    assert skipped["note"] == "skipped: torch.compile finds no C++ compiler; install g++"
    assert skipped["ms_per_token_p50"] is skipped["ratio_to_floor"] is skipped["cache_bytes"] is None
    for row in rows.values():
        assert 0 < row["ms_per_token_p50"] <= row["ms_per_token_p95"]
        assert row["ratio_to_floor"] == row["ms_per_token_p50"] / row["floor_ms"]
        assert row["peak_mem_bytes"] > 2**20
        assert row["tokens_per_s"] <= 2 * 1e3 * 8 / row["ms_per_token_p50"]
    assert rows["matmuls"]["ratio_to_floor"] == 1
    decoder = StreamingDecoder(model, 1, 15, batch_size=2)
    for name in ("generate", "step"):
        assert rows[name]["floor_ms"] == rows["matmuls"]["ms_per_token_p50"]
        assert rows[name]["cache_bytes"] == decoder.cache_bytes
        assert rows[name]["stream_pos"] == 16 + contenders.OVERFILL_TOKENS + bench.WARM_UP_TOKENS["cpu"] + 8
    assert result["bandwidth_bytes_per_s"] is None
    assert result["environment"]["torch"] == torch.__version__


def test_recomputation_is_compared_with_as_many_keys(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    monkeypatch.setattr(bench, "PEERS", ())
    result = bench_decode(
        DecodeBench(["tiny"], layouts=[LAYOUT], num_tokens=4, use_peers=True, recompute_windows=[1, 300])
    )
    assert [(row["sinks"], row["window"]) for row in result["recompute"]] == [(0, 1), (1, 299)]
    for row in result["recompute"]:
        assert row["ratio"] == row["recompute_ms_p50"] / row["streaming_ms_p50"]


class BrokenPeer(CatAndRotatePeer):
    name = "broken"
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def step(self, tokens: Tensor) -> Tensor:
        raise self.error


def test_a_peer_that_fails_is_a_row_that_says_why(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    monkeypatch.setattr(bench, "PEERS", (BrokenPeer, CatAndRotatePeer))
    result = bench_decode(DecodeBench(["tiny"], layouts=[LAYOUT], num_tokens=2, use_peers=True))
    broken, next_peer = result["rows"][-2:]
    assert broken["note"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert broken["ms_per_token_p50"] is None
    assert next_peer["ms_per_token_p50"] > 0


def test_a_cell_too_large_for_the_device_is_a_row_and_the_next_cell_is_timed(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    make = contenders.generate_contender

    def generate_contender(cell: Cell) -> Contender:
        if cell.batch_size == 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(cell)

    monkeypatch.setattr(bench, "generate_contender", generate_contender)
    rows = bench_decode(DecodeBench(["tiny"], layouts=[LAYOUT], batch_sizes=[64, 1], num_tokens=1))["rows"]
    assert [(row["name"], row["batch"]) for row in rows[:2]] == [("generate", 64), ("generate", 1)]
    assert rows[0]["note"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert rows[1]["ms_per_token_p50"] > 0


def test_a_defect_of_ours_is_not_taken_for_a_failing_peer(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    monkeypatch.setattr(StreamingDecoder, "step", BrokenPeer.step)
    monkeypatch.setattr(StreamingDecoder, "error", RuntimeError("a defect"), raising=False)
    with pytest.raises(RuntimeError, match="a defect"):
        bench_decode(DecodeBench(["tiny"], layouts=[LAYOUT], num_tokens=1))


def test_ctrl_c_is_not_taken_for_a_failing_peer(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    monkeypatch.setattr(bench, "PEERS", (BrokenPeer,))
    monkeypatch.setattr(BrokenPeer, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench_decode(DecodeBench(["tiny"], layouts=[LAYOUT], num_tokens=2, use_peers=True))


def test_on_the_cpu_contenders_take_turns_and_the_floor_is_the_products(model):
    turns: list[str] = []
    both = [Contender(name, lambda name=name: turns.append(name), 0) for name in ("ours", contenders.MATMULS)]
    rows = bench._measured(Cell("tiny", model, LAYOUT, 1), both, 20, None, bench._bar("test"))
    ours, products = ["ours"], [contenders.MATMULS]
    assert turns == ours * 16 + products * 16 + ours * 4 + products * 4
    assert rows[0].floor_ms == rows[1].ms_per_token_p50


def test_the_peak_counts_from_the_last_reset():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system keeps no peak that can be reset")
    cpu = torch.device("cpu")
    large = torch.ones(2**26)
    assert large.sum() == 2**26
    before = timing.peak_bytes(cpu)
    del large
    timing.reset_peak(cpu)
    assert timing.peak_bytes(cpu) < before - 2**27
    assert timing.held_bytes(cpu) <= timing.peak_bytes(cpu)


def test_a_layout_longer_than_the_training_is_timed(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    longer = Layout(1, model.config.network.max_position_embeddings)
    rows = bench_decode(DecodeBench(["tiny"], layouts=[longer], num_tokens=1))["rows"]
    assert rows[0]["window"] == longer.window
    assert rows[0]["ms_per_token_p50"] > 0


def test_a_preset_has_the_weights_of_the_first_training_step(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "14m", TINY)
    model = bench.preset_model("14m", torch.device("cpu"), torch.float32)
    std = model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.std().item()
    assert std == pytest.approx((2 / (5 * TINY.hidden_size)) ** 0.5, rel=0.1)
    again = bench.preset_model("14m", torch.device("cpu"), torch.float32)
    assert torch.equal(model.embed_out.weight, again.embed_out.weight)


# -- a long stream --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "marks"),
    [
        (1_000_000, [2_000, 10_000, 100_000, 1_000_000]),
        (5_000, [2_000, 5_000]),
        (2_000_000, [2_000, 10_000, 100_000, 1_000_000, 2_000_000]),
        (1_500, [1_500]),
    ],
)
def test_marks_of_a_trace(last, marks):
    assert trace_marks(last) == marks


def test_a_trace_looks_at_the_tokens_before_each_mark(model, monkeypatch):
    monkeypatch.setattr(bench, "_models", lambda _: iter([("tiny", model)]))
    monkeypatch.setattr(bench, "FIRST_MARK", 60)
    monkeypatch.setattr(bench, "MARK_TOKENS", 10)
    spans: list[int] = []
    measured = bench._measured

    def watched(cell: Cell, timed: Any, num_tokens: int, *others: Any) -> Any:
        spans.append(num_tokens)
        return measured(cell, timed, num_tokens, *others)

    monkeypatch.setattr(bench, "_measured", watched)
    result = bench_decode(DecodeBench(["tiny"], layouts=[LAYOUT], num_tokens=80, is_trace=True))
    assert [row["stream_pos"] for row in result["rows"]] == [60, 80]
    assert {row["name"] for row in result["rows"]} == {"generate"}
    assert spans == [10, 10]
    assert all(row["ratio_to_floor"] > 0 and row["peak_mem_bytes"] > 2**20 for row in result["rows"])


# -- the command ----------------------------------------------------------------------------------

Said = tuple[int, str, str]
Run = Callable[[str], Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(typed: str) -> Said:
        capsys.readouterr()
        return cli.main(["bench", *typed.split()]), *capsys.readouterr()

    return run_command


def test_json_is_the_whole_result_and_nothing_is_rounded(run, run_folder):
    code, out, _ = run(f"decode --model {run_folder} --tokens 3 --layouts 1+7,2+6 --json")
    assert code == 0
    result = json.loads(out)
    assert out == json.dumps(result, indent=2) + "\n"
    assert list(result) == ["schema_version", "environment", "bandwidth_bytes_per_s", "rows", "recompute"]
    assert result["schema_version"] == 1
    assert [(row["name"], row["sinks"]) for row in result["rows"]] == [
        (name, sinks) for sinks in (1, 2) for name in ("generate", "step", "matmuls")
    ]
    assert set(result["rows"][0]) == {field.name for field in fields(bench.BenchRow)}
    assert any(row["ms_per_token_p50"] != round(row["ms_per_token_p50"], 4) for row in result["rows"])


def test_a_checkpoint_is_timed_with_the_layout_that_it_streams_with(run, run_folder):
    _, out, _ = run(f"decode --model {run_folder} --tokens 1 --json")
    row = json.loads(out)["rows"][0]
    assert (row["preset"], row["sinks"], row["window"]) == ("tiny", 4, 28)


def test_the_table_shows_every_cell_what_it_ran_on_and_the_recomputation(run, no_compiler, monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "14m", TINY)
    code, out, _ = run(
        "decode --preset pythia-14m --layouts 1+15 --batch 1,2 --tokens 4 --dtype float64 "
        "--peers --recompute-windows 8"
    )
    assert code == 0
    assert out.startswith("cpu (")
    assert f"torch {torch.__version__}" in out
    assert "14m, float64, 1+15, batch 1" in out
    assert "14m, float64, 1+15, batch 2" in out
    assert len(re.findall(r"^generate +[\d.]+ +[\d.]+ +[\d,.]+ +[\d.]+ ", out, re.MULTILINE)) == 2
    assert "  transformers-static: skipped: torch.compile finds no C++ compiler" in out
    assert re.search(r"^14m, float64 +8 +[\d.]+ +[\d.]+ +[\d.]+$", out, re.MULTILINE)


def test_the_table_of_a_trace_compares_its_end_with_its_beginning(run, run_folder, monkeypatch):
    monkeypatch.setattr(bench, "FIRST_MARK", 40)
    _, out, _ = run(f"decode --model {run_folder} --layouts 1+7 --tokens 60 --trace")
    assert re.search(r"token 60 takes [\d.]+ of the time that token 40 takes, and [+-][\d,]+ bytes", out)


def test_threads_are_as_asked(run, run_folder):
    before = torch.get_num_threads()
    try:
        _, out, _ = run(f"decode --model {run_folder} --tokens 1 --threads 2 --json")
        assert json.loads(out)["environment"]["num_threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_without_peers_transformers_is_not_imported(run_folder):
    script = (
        "import sys; from sinktrain.cli import main\n"
        f"assert main(['bench', 'decode', '--model', {str(run_folder)!r}, '--tokens', '1']) == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_options_of_evaluate_reach_the_benchmark(run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        bench_evaluate, "bench_evaluate", lambda request: asked.append(request) or {"rows": []}
    )
    assert run("evaluate --device cpu --json") == (0, '{\n  "rows": []\n}\n', "")
    run("evaluate --model m --layouts 1+7,3+5 --tokens 4_000 --streams 3 --device cpu --dtype float64 --json")
    run("evaluate --preset 14m,pythia-31m --device cpu --json")
    cpu = torch.device("cpu")
    assert asked == [
        EvaluateBench(["160m"], None, [], 0, 0, cpu, torch.float32),
        EvaluateBench([], "m", [Layout(1, 7), Layout(3, 5)], 4000, 3, cpu, torch.float64),
        EvaluateBench(["14m", "31m"], None, [], 0, 0, cpu, torch.float32),
    ]


MISTAKES = [
    ("decod", 'no benchmark "decod"; did you mean "decode"?; there are train, decode, evaluate'),
    ("", "the following arguments are required: train|decode|evaluate; see sinktrain bench --help"),
    ("decode --streams 2", "--streams is for bench evaluate; leave it out here"),
    ("evaluate --batch 2", "--batch is for bench decode; leave it out here"),
    ("evaluate --peers", "--peers is for bench train and decode; leave it out here"),
    ("evaluate --trace", "--trace is for bench decode; leave it out here"),
    ("evaluate --recompute-windows none", "--recompute-windows is for bench decode; leave it out here"),
    ("evaluate --streams 0", "argument --streams: 0 is not a number of streams; use 1 or more"),
    ("evaluate --layouts 1024", 'layout "1024" is not sinks+window'),
    ("evaluate --tokens inf", "--tokens inf would never end; use a number"),
    ("evaluate --model x --preset 14m", "--model and --preset both say what to time; give one of them"),
    ("evaluate --preset 15m", 'no preset "15m"; did you mean "14m"?; there are 14m, 31m, 70m'),
    ("decode --preset 15m", 'no preset "15m"; did you mean "14m"?; there are 14m, 31m, 70m'),
    ("decode --preset 14m,", 'no preset ""'),
    ("decode --model x --preset 14m", "--model and --preset both say what to time; give one of them"),
    ("decode --batch 0", "--batch 0 is not a list of numbers from 1 on; write it like 1,32"),
    ("decode --recompute-windows x", "--recompute-windows x is not a list of numbers from 1 on"),
    ("decode --layouts 1024", 'layout "1024" is not sinks+window'),
    ("decode --threads 0", "--threads 0 is not a number of threads; use 1 or more"),
    ("decode --tokens inf", "--tokens inf would never end; use a number"),
    ("decode --tokens 0", "argument --tokens: 0 is not a number of tokens"),
    ("decode --device meta", "--device meta: only cpu and cuda are timed; use one of them"),
    ("decode --trace --batch 1,2", "--trace follows one stream; give one preset, layout and batch size"),
    ("decode --trace --peers", "--trace follows one stream"),
    (
        "decode --preset 14m --layouts 1+7 --trace --tokens 20",
        "--trace times nothing before position 32, when 1+7 is full; use more than --tokens 20",
    ),
]


@pytest.mark.parametrize(("typed", "message"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_line(run, monkeypatch, typed, message):
    monkeypatch.setitem(bench.PRESETS, "14m", TINY)
    code, out, err = run(typed)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].split("\r")[-1].lstrip().startswith(f"sinktrain bench: {message}")


def test_presets_have_short_names_and_long_ones():
    assert bench.preset_name("160m") == bench.preset_name(" pythia-160m") == "160m"
    with pytest.raises(ConfigError, match='no preset "pythia-2b"'):
        bench.preset_name("pythia-2b")


@pytest.mark.gpu
def test_a_gpu_is_timed_with_every_peer():
    small = replace(PYTHIA["pythia-14m"], vocab_size=512)
    model = tiny_model(dtype=torch.bfloat16, **asdict(small)).to("cuda")
    cell_request = DecodeBench(
        ["14m"], None, [Layout(1, 255)], [1, 4], torch.device("cuda"), torch.bfloat16, 64, True, [256]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_models", lambda _: iter([("14m", model)]))
        result = bench_decode(cell_request)
    assert result["bandwidth_bytes_per_s"] > 1e10
    peer_names = [peer.name for peer in peers.PEERS]
    assert [row["name"] for row in result["rows"]] == ["generate", "step", *peer_names] * 2
    assert [row["note"] for row in result["rows"] if row["ms_per_token_p50"] is None] == []
    assert all(row["ratio_to_floor"] > 0.9 for row in result["rows"])
    assert result["recompute"][0]["ratio"] > 0


def test_every_peer_says_how_it_is_run(model, monkeypatch):
    monkeypatch.setattr(peers, "has_cpp_compiler", lambda: True)
    made: list[Peer] = [peer(model, LAYOUT, 1) for peer in peers.PEERS]
    assert len({peer.name for peer in made}) == len({peer.note for peer in made}) == len(peers.PEERS) == 4
