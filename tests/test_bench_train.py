"""``sinktrain bench train``: who takes which steps when, that all train the same, and what is told of it."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from sinktrain import cli
from sinktrain.experiments import bench_train as module
from sinktrain.experiments import training_contenders, training_peers
from sinktrain.experiments.bench_table import train_table
from sinktrain.experiments.bench_train import PartRow, TrainBench, TrainRow, bench_train, strategies, workload
from sinktrain.experiments.peer_training import LOSS_TOLERANCE, PeerTraining
from sinktrain.experiments.time_by_part import PART_NAMES, part_of, time_by_part
from sinktrain.experiments.training_contenders import OurTraining, Rounds
from sinktrain.experiments.training_peers import PEERS, PlainPeer, TransformersPeer, litgpt_config
from sinktrain.model.config import PYTHIA, ModelConfig
from sinktrain.training.metrics import Metrics, ProgressBar
from sinktrain.training.saving import Checkpoints
from sinktrain.training.throughput import flops_per_token

CPU = torch.device("cpu")
TINY = "model: {network: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}}\n"
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def seen() -> Seen:
    """What was watched while ``result`` was made."""
    return {"order": [], "callbacks": [], "saved": [], "batches": []}


@pytest.fixture(scope="module")
def result(tiny: str, seen: Seen) -> dict[str, Any]:
    """Two rounds of two steps of vanilla, sink and peers, litgpt not among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_contenders, "VOCAB_SIZE", 270)
        patch.setattr(training_peers, "find_spec", lambda name: None)
        _watch(patch, seen)
        request = TrainBench(
            [tiny], seq_len=16, micro_batch=2, global_batch=6, num_rounds=2, use_peers=True, kinds=["token"]
        )
        made = bench_train(request)
    assert made is not None
    return made


def _watch(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    our_run, peer_run, end_round, save = (
        OurTraining.run,
        PeerTraining.run,
        Rounds._end_round,
        Checkpoints.save,
    )

    def watched_ours(ours: OurTraining, number: int) -> None:
        seen["order"].append((ours.trained.name, number))
        our_run(ours, number)

    def watched_peer(peer: PeerTraining, number: int) -> None:
        seen["order"].append((peer.record.name, number))
        peer_run(peer, number)

    def watched_end(rounds: Rounds, trainer: Any, pretraining: Any) -> None:
        seen["callbacks"].append([type(callback) for callback in trainer.callbacks])
        end_round(rounds, trainer, pretraining)

    def watched_save(checkpoints: Checkpoints, trainer: pl.Trainer) -> None:
        seen["saved"].append(trainer.global_step)
        save(checkpoints, trainer)

    patch.setattr(OurTraining, "run", watched_ours)
    patch.setattr(PeerTraining, "run", watched_peer)
    patch.setattr(Rounds, "_end_round", watched_end)
    patch.setattr(Checkpoints, "save", watched_save)


def row_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [row for row in result["rows"] if row["name"] == name]
    return dict(found)


# -- rows -----------------------------------------------------------------------------------------


def test_there_is_a_row_for_each_way_to_train(result):
    assert list(result) == ["schema_version", "environment", "peak_flops", "rows", "parts", "stopped"]
    assert {"torch", "device", "lightning", "litgpt"} <= result["environment"].keys()
    json.dumps(result, allow_nan=False)
    assert [row["name"] for row in result["rows"]] == [
        "sinktrain",
        "sinktrain, bare loop",
        "sinktrain, token",
        "sinktrain, token, bare loop",
        "plain torch",
        "transformers",
        "litgpt",
    ]
    for row in result["rows"]:
        assert list(row) == [one.name for one in fields(TrainRow)]
        assert (row["preset"], row["device"], row["dtype"]) == ("tiny", "cpu", "float32")
        assert (row["seq_len"], row["micro_batch"], row["global_batch"]) == (16, 2, 6)
        assert (row["num_devices"], row["strategy"]) == (1, None)


def test_speeds_are_tokens_over_the_median_rounds_time(result):
    timed = result["rows"][:-1]
    for row in timed:
        assert len(row["step_s_rounds"]) == 2
        assert row["step_s"] == statistics.median(row["step_s_rounds"]) > 0
        assert row["tokens_per_s"] == 6 * 16 / row["step_s"]
        assert row["spread"] == (max(row["step_s_rounds"]) - min(row["step_s_rounds"])) / row["step_s"]
        assert row["ours_over_this"] == timed[0]["tokens_per_s"] / row["tokens_per_s"]
        assert row["peak_mem_bytes"] > 2**20


def test_what_the_trainer_costs_is_the_median_over_pairs_of_neighbouring_rounds(result):
    for name in ("sinktrain", "sinktrain, token"):
        trained, bare = row_of(result, name), row_of(result, f"{name}, bare loop")
        pairs = zip(trained["step_s_rounds"], bare["step_s_rounds"], strict=True)
        assert trained["overhead"] == statistics.median(a / b - 1 for a, b in pairs)
        assert bare["overhead"] is None


def test_the_trainers_rows_tell_of_loader_skipped_steps_and_compilation(result):
    for name in ("sinktrain", "sinktrain, token"):
        row = row_of(result, name)
        assert 0 <= row["data_wait"] < 1
        assert row["skipped_steps"] == 0
        assert row["compile_s"] >= 0
    assert row_of(result, "plain torch")["data_wait"] is None


def test_contenders_take_turns(result, seen):
    names = ["sinktrain", "sinktrain, token", "plain torch", "transformers"]
    first = [(name, 0) for name in [*names, "litgpt"]]
    assert seen["order"] == first + [(name, 1) for name in names]


def test_the_trainer_runs_with_the_callbacks_of_fit_but_its_bar(result, seen):
    assert len(seen["callbacks"]) == 4
    for callbacks in seen["callbacks"]:
        assert {Metrics, Checkpoints} <= set(callbacks)
        assert ProgressBar not in callbacks


def test_one_checkpoint_is_saved_and_timed(result, seen):
    assert set(seen["saved"]) == {training_contenders.WARM_UP_STEPS["cpu"] + 2}
    assert row_of(result, "sinktrain")["checkpoint_s"] > 0
    assert [row["checkpoint_s"] for row in result["rows"][1:]] == [None] * 6


# -- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain torch", "transformers"])
def test_a_peers_first_losses_are_ours(result, name):
    ours, peers = row_of(result, "sinktrain")["first_losses"], row_of(result, name)["first_losses"]
    assert peers == pytest.approx(ours, abs=2e-4)
    assert abs(ours[0] - ours[1]) > 2e-3  # so that the second shows that the first step was taken alike


def test_a_peer_that_trains_otherwise_or_fails_is_not_timed_and_the_others_are(tiny, monkeypatch):
    class Louder(PlainPeer):
        name = "louder"

        def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            return 1.1 * super().loss(inputs, targets)

    class TooLarge(PlainPeer):
        name = "too large"

        def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore words")

    monkeypatch.setattr(training_contenders, "VOCAB_SIZE", 270)
    monkeypatch.setattr(module, "PEERS", (Louder, TooLarge, PlainPeer))
    monkeypatch.setattr(module, "peak_flops", lambda device: 1e12)
    result = bench_train(
        TrainBench([tiny], CPU, torch.bfloat16, 16, 2, 4, num_steps=1, num_rounds=1, use_peers=True)
    )
    assert result is not None
    louder, too_large, plain = (row_of(result, name) for name in ("louder", "too large", "plain torch"))
    assert louder["note"].startswith("not timed, because it does not train the same: its first losses are 6.")
    assert too_large["note"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert louder["tokens_per_s"] is too_large["tokens_per_s"] is None
    assert plain["tokens_per_s"] > 0
    ours = row_of(result, "sinktrain")
    assert plain["first_losses"] == pytest.approx(ours["first_losses"], abs=LOSS_TOLERANCE[torch.bfloat16])
    assert_mfu_counts_attention_whole_and_by_half(ours)


def assert_mfu_counts_attention_whole_and_by_half(row: dict[str, Any]) -> None:
    """On a device whose peak is 1 TFLOP/s."""
    weights = 2 * 12 * 32**2 + 384 * 32
    attention = 12 * 2 * 32 * 16
    assert row["flops_per_token"] == 6 * weights + attention
    assert row["flops_per_token_causal"] == 6 * weights + attention / 2
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * row["flops_per_token"] / 1e12, rel=1e-12)
    assert row["mfu_causal"] == pytest.approx(
        row["tokens_per_s"] * row["flops_per_token_causal"] / 1e12, rel=1e-12
    )


def test_flops_are_those_that_fit_reports(result):
    network = ModelConfig(PYTHIA["pythia-160m"]).network
    row = row_of(result, "sinktrain")
    ratio = row["flops_per_token"] - row["flops_per_token_causal"]
    assert ratio == 6 * 2 * 32 * 16
    assert flops_per_token(network, 50304, 2048) == pytest.approx(0.968e9, rel=1e-3)


def test_litgpt_that_is_missing_is_named_with_what_installs_it(result):
    row = row_of(result, "litgpt")
    assert row["note"] == f"skipped: litgpt is not installed; {training_peers.LITGPT_COMMAND}"
    assert row["tokens_per_s"] is None


def test_litgpt_trains_the_same(tiny, monkeypatch):
    pytest.importorskip("litgpt")
    monkeypatch.setattr(training_contenders, "VOCAB_SIZE", 270)
    monkeypatch.setattr(module, "PEERS", PEERS[2:])
    result = bench_train(TrainBench([tiny], CPU, seq_len=16, num_steps=1, num_rounds=2, use_peers=True))
    assert result is not None
    ours, theirs = (row_of(result, name) for name in ("sinktrain", "litgpt"))
    assert theirs["first_losses"] == pytest.approx(ours["first_losses"], abs=2e-4)
    assert theirs["tokens_per_s"] > 0
    shipped = sys.modules["litgpt.config"].Config.from_name("pythia-160m")
    made = litgpt_config(ModelConfig(PYTHIA["pythia-160m"]))
    assert {one.name for one in fields(made) if getattr(made, one.name) != getattr(shipped, one.name)} <= {
        "name",
        "hf_config",
        "vocab_size",
        "padding_multiple",
    }


# -- parts ----------------------------------------------------------------------------------------

KERNELS = {
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32>": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "softmax_gradient": "loss",
    "triton_red_fused__log_softmax_nll_loss_forward_12": "loss",
    "rotate_heads": "rotation",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "void at::native::lpnorm_cleanup<float, at::native::NormType>": "optimizer",
    "triton_poi_fused__scaled_dot_product_cudnn_attention_cat_mul_4": "norms, activations, pointwise",
    "triton_red_fused_native_layer_norm_backward_7": "norms, activations, pointwise",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>": "norms, activations, pointwise",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
    "Memcpy DtoD (Device -> Device)": "other",
    "aten::addmm": "matrix products",
    "aten::_fused_adamw_": "optimizer",
    "aten::gelu_backward": "norms, activations, pointwise",
}


@pytest.mark.parametrize(("kernel", "part"), KERNELS.items())
def test_a_kernels_name_tells_its_part(kernel, part):
    assert part_of(kernel) == part
    assert part in PART_NAMES


def test_time_by_part_is_that_of_one_step():
    a = torch.randn(256, 256)

    def multiply(num_steps: int) -> None:
        for _ in range(10 * num_steps):
            torch.mm(a, a)

    parts = time_by_part(multiply, 2, CPU)
    assert list(parts) == list(PART_NAMES)
    assert parts["matrix products"] > 0.9 * sum(parts.values())


def test_shares_are_of_the_timed_step(result):
    assert [list(part) for part in result["parts"]] == [
        [one.name for one in fields(PartRow)] for _ in result["parts"]
    ]
    assert {part["name"] for part in result["parts"]} == {
        "sinktrain, bare loop",
        "plain torch",
        "transformers",
    }
    for part in result["parts"]:
        step_s = row_of(result, part["name"])["step_s"]
        assert part["share"] == pytest.approx(part["ms"] / 1e3 / step_s, rel=1e-12)


# -- what is chosen, and printed ------------------------------------------------------------------


def test_sizes_left_out_go_by_device_and_config(tmp_path):
    def chosen(config: str, kind: str, **sizes: int) -> tuple[int, ...]:
        work = workload(TrainBench([config], torch.device(kind), **sizes), config, tmp_path)
        return work.seq_len, work.micro_batch, work.global_batch, work.num_steps

    assert chosen("pythia-160m", "cuda") == (2048, 32, 64, 20)
    assert chosen("pythia-410m", "cuda", num_devices=2) == (2048, 16, 64, 20)
    assert chosen("pythia-1.4b", "cuda") == (2048, 8, 16, 20)
    assert chosen("pythia-1.4b", "cuda", micro_batch=4, num_steps=7) == (2048, 4, 8, 7)
    assert chosen("pythia-14m", "cpu", global_batch=6) == (128, 1, 6, 2)


@pytest.mark.parametrize(
    ("config", "name"), [("pythia-1.4b", "1.4b"), ("small", "small"), ("mine/tiny.yaml", "tiny")]
)
def test_a_workload_has_the_name_of_its_config(config, name, tmp_path):
    assert workload(TrainBench([config], torch.device("cuda")), config, tmp_path).preset == name


def test_one_of_several_gpus_is_named_to_the_trainer(tmp_path):
    request = TrainBench(["pythia-160m"], torch.device("cuda:1"), torch.bfloat16)
    typed = workload(request, "pythia-160m", tmp_path).fit_arguments(
        "ours", ["--model.sink.kind", "zero"], 12
    )
    assert typed[:2] == ["--config", "pythia-160m"]
    settings = dict(zip(typed[2::2], typed[3::2], strict=True))
    assert settings["--model.sink.kind"] == "zero"
    assert settings["--trainer.devices"] == "[1]"
    assert settings["--trainer.accelerator"] == "gpu"
    assert settings["--trainer.precision"] == "bf16-mixed"


def test_strategies_are_the_overlays_that_choose_one():
    assert "ddp" in strategies()
    assert not {"sink", "wandb", "pythia-160m"} & set(strategies())


def test_the_table_says_what_the_rows_do(result):
    lines = train_table(result).splitlines()
    assert lines[1] == "peak unknown: no MFU"
    assert lines[3] == (
        "tiny, float32, 1 device, sequence 16, global batch 6 in micro-batches of 2: 96 tokens a step"
    )
    ours = row_of(result, "sinktrain")
    assert lines[5].split()[:2] == ["sinktrain", f"{ours['tokens_per_s']:,.0f}"]
    told = "\n".join(lines)
    cost = f"{100 * ours['overhead']:.1f}%" if ours["overhead"] > 0 else "nothing measurable"
    assert f"Trainer and callbacks cost {cost} over the bare loop" in told
    assert f"a checkpoint stops it for {ours['checkpoint_s']:.2f} s" in told
    assert "  litgpt: skipped: litgpt is not installed" in told
    assert "time by part, ms a step" in told


def test_the_table_tells_of_mfu_skipped_steps_and_efficiency(result):
    row = row_of(result, "sinktrain") | {
        "mfu": 0.4754,
        "mfu_causal": 0.4201,
        "skipped_steps": 2,
        "num_devices": 2,
        "strategy": "ddp",
        "speedup": 1.957,
        "efficiency": 0.9785,
    }
    told = train_table(result | {"peak_flops": 989.4e12, "rows": [row], "parts": []})
    assert "peak: 989.4 TFLOP/s in bfloat16" in told
    assert "2 devices by ddp" in told
    assert "47.5" in told
    assert "42.0" in told
    assert "1.957 x one device, efficiency 97.9%" in told
    assert "2 steps were skipped" in told


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    def run_command(typed: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.main(["bench", *typed.split()]), *capsys.readouterr()

    return run_command


def test_the_command_asks_for_what_was_typed(run, monkeypatch):
    asked: list[TrainBench] = []
    monkeypatch.setattr(module, "bench_train", lambda request: asked.append(request) or {"stopped": None})
    assert run("train --device cpu --json") == (0, '{\n  "stopped": null\n}\n', "")
    run(
        "train --preset 14m,410m --device cpu --dtype bfloat16 --seq-len 64 --micro-batch 2 --global-batch 8 "
        "--steps 3 --rounds 5 --devices 2 --strategy ddp --json"
    )
    run("train --peers --kinds token,zero --device cpu --json")
    assert asked == [
        TrainBench(["pythia-160m"], CPU, torch.float32, kinds=[]),
        TrainBench(["pythia-14m", "pythia-410m"], CPU, torch.bfloat16, 64, 2, 8, 3, 5, False, [], 2, "ddp"),
        TrainBench(["pythia-160m"], CPU, torch.float32, use_peers=True, kinds=["token", "zero"]),
    ]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_was_measured_before_a_signal_is_told(tiny, monkeypatch, run, signum):
    """In the second round of ours: the first is told."""
    monkeypatch.setattr(training_contenders, "VOCAB_SIZE", 270)
    our_run = OurTraining.run

    def stopped_run(ours: OurTraining, number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signum)
        our_run(ours, number)

    monkeypatch.setattr(OurTraining, "run", stopped_run)
    asked = TrainBench([tiny, tiny], seq_len=16, micro_batch=2, global_batch=6, num_rounds=2)
    result = bench_train(asked)
    assert result["stopped"] == signum
    assert [len(row["step_s_rounds"]) for row in result["rows"]] == [1, 1]  # and of the second config none
    monkeypatch.setattr(module, "bench_train", lambda request: result)
    with pytest.raises(SystemExit) as ended:
        run("train --device cpu")
    assert ended.value.code == 128 + signum


def test_what_a_signal_left_unmeasured_says_so(tiny, monkeypatch):
    monkeypatch.setattr(training_contenders, "VOCAB_SIZE", 270)
    monkeypatch.setattr(OurTraining, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = bench_train(TrainBench([tiny], seq_len=16, micro_batch=2, global_batch=6, use_peers=True))
    assert {row["note"] for row in result["rows"]} == {"not measured: stopped by SIGTERM"}
    train_table(result)


def test_ranks_other_than_0_print_nothing(run, monkeypatch):
    monkeypatch.setattr(module, "bench_train", lambda request: None)
    assert run("train --device cpu") == (0, "", "")


MISTAKES = [
    ("train --preset 15m", 'no preset "15m"; did you mean "14m"?; there are 14m'),
    ("train --steps 0", "argument --steps: 0 is not a number of steps; use 1 or more"),
    ("train --micro-batch x", "argument --micro-batch: x is not a number of samples; use 1 or more"),
    (
        "train --micro-batch 4 --global-batch 6",
        "--global-batch 6 does not divide into 1 device x micro-batches of 4; use a multiple of 4",
    ),
    (
        "train --micro-batch 2 --global-batch 6 --devices 2",
        "--global-batch 6 does not divide into 2 devices x micro-batches of 2; use a multiple of 4",
    ),
    ("train --seq-len 8", "data.seq_len is 8; use more than 8, which sinks may take"),
    ("train --strategy dpp", '--strategy "dpp" is no overlay; did you mean "ddp"?; there are'),
    ("train --devices 2 --peers", "--peers and --kinds are timed on one device; leave them out with ddp"),
    (
        "train --strategy ddp --kinds all",
        "--peers and --kinds are timed on one device; leave them out with ddp",
    ),
    ("train --dtype float64", "--dtype float64: training is timed in bfloat16 or float32; use one of them"),
    ("train --device meta", "--device meta: only cpu and cuda are timed; use one of them"),
    ("train --kinds zeor", '--kinds "zeor" is not one of gate, k_bias,'),
    ("train --kinds all,zero", "--kinds all,zero: all stands alone; leave it or the others out"),
    ("train --device cpu:0 --devices 2", "--device cpu:0 is one device; use cpu with ddp"),
    ("train --model x", "--model is for bench decode and evaluate; leave it out here"),
    ("train --layouts 1+7", "--layouts is for bench decode and evaluate; leave it out here"),
    ("train --tokens 9", "--tokens is for bench decode and evaluate; leave it out here"),
    ("train --batch 2", "--batch is for bench decode; leave it out here"),
    ("decode --kinds zero", "--kinds is for bench train; leave it out here"),
    ("decode --rounds 2", "--rounds is for bench train; leave it out here"),
    ("evaluate --peers", "--peers is for bench train and decode; leave it out here"),
    ("evaluate --strategy ddp", "--strategy is for bench train; leave it out here"),
    ("trane", 'no benchmark "trane"; did you mean "train"?; there are train, decode, evaluate'),
]


@pytest.mark.parametrize(("typed", "message"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_line(run, typed, message):
    code, out, err = run(typed)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith(f"sinktrain bench: {message}")


# -- slow, and on GPUs ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_compared_with_one(tmp_path):
    command = [
        str(Path(sys.executable).with_name("sinktrain")),
        "bench",
        "train",
        "--preset",
        "14m",
        "--json",
    ]
    command += ["--devices", "2", "--device", "cpu", "--seq-len", "16", "--steps", "1", "--rounds", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    alone, alone_bare, together, bare = json.loads(done.stdout)["rows"]  # rank 0 speaks for both
    assert [alone["name"], alone_bare["name"]] == [
        "sinktrain, one device",
        "sinktrain, one device, bare loop",
    ]
    assert (alone["num_devices"], alone["strategy"], alone["global_batch"]) == (1, None, 2)
    assert (together["num_devices"], together["strategy"], together["global_batch"]) == (2, "ddp", 4)
    assert together["speedup"] == together["tokens_per_s"] / alone["tokens_per_s"]
    assert together["efficiency"] == together["speedup"] / 2
    assert len(together["step_s_rounds"]) == len(bare["step_s_rounds"]) == 2
    assert together["checkpoint_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_gpu_is_timed_with_every_peer_and_its_parts_fit_into_the_step():
    request = TrainBench(
        ["pythia-14m"],
        torch.device("cuda"),
        torch.bfloat16,
        256,
        4,
        num_steps=5,
        num_rounds=2,
        use_peers=True,
    )
    result = bench_train(request)
    assert result is not None
    timed = [row for row in result["rows"] if not row["note"].startswith("skipped")]
    assert [row["note"] for row in timed if row["tokens_per_s"] is None] == []
    assert {PlainPeer.name, TransformersPeer.name} <= {row["name"] for row in timed}
    for row in timed:
        shares = [part["share"] for part in result["parts"] if part["name"] == row["name"]]
        assert sum(shares) < 1.1
        assert row["peak_mem_bytes"] < 8 * 2**30
    parts = {part["part"] for part in result["parts"] if part["name"] == "sinktrain, bare loop"}
    assert {"matrix products", "attention", "loss", "optimizer"} <= parts
