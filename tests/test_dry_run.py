"""Before a run: what a dry run says and refuses, a trial that keeps nothing, devices that cannot."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_shards import tiny_run

from sinktrain.cli import main
from sinktrain.errors import ConfigError
from sinktrain.model.config import ModelConfig, NetworkConfig
from sinktrain.training import checks, dry_run
from sinktrain.training.checks import check_device, check_precision
from sinktrain.training.dry_run import counted, host_bytes, hours, in_memory, on_disk, steps_text
from sinktrain.training.memory import GIB, estimate_memory
from sinktrain.training.metrics import Metrics
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.saving import Checkpoints
from sinktrain.training.trial import TrialBar


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def finished(undisturbed: Path) -> Path:
    return undisturbed


@pytest.fixture
def planned(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, str]]:
    """What a dry run says, by subject."""

    def say(*options: str) -> dict[str, str]:
        assert main(["fit", *tiny_run(shards, tmp_path / "run", *options), "--dry_run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("/run: a dry run; nothing is written, nothing is trained")
        return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[1:])

    return say


# -- a dry run ------------------------------------------------------------------------------------


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(
    planned: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    told = planned("--config", "sink", "--config", "tensorboard", "--data.micro_batch", "2")
    assert not (tmp_path / "run").exists()
    assert told["start"] == "from the start"
    assert told["model"].startswith("token, 0.1m parameters")
    assert told["data"] == "3,000 tokens in train, 93 samples of 32; 1.03 epochs"
    assert told["steps"] == "12 of 8 samples (devices 1 x micro-batches 4 x 2): 3,072 tokens"
    assert told["checkpoints"].startswith(
        "3 times, after steps 4, 8, 12; 0.6 MB each, 3 checkpoints at once: 1.8 MB, and "
    )
    assert told["validation"] == "3 times, after steps 5, 10, 12; 10 samples"
    assert told["time"].startswith("unknown: the peak of this device is not")


def test_the_size_of_a_checkpoint_is_what_the_run_then_writes(
    train: Callable[..., Path], planned: Callable[..., dict[str, str]]
) -> None:
    wide = ("--model.network.hidden_size", "128")
    told = planned(*wide)["checkpoints"]
    written = (train("run", *wide) / "checkpoints" / "last.ckpt").stat().st_size
    each = re.search(r"; ([\d.]+) MB each", told)
    assert each is not None
    assert float(each[1]) * 1e6 == pytest.approx(written, rel=0.03)


def test_a_dry_run_of_a_run_that_goes_on_tells_what_is_left_at_its_own_speed(
    finished: Path, planned: Callable[..., dict[str, str]]
) -> None:
    before = contents(finished)
    told = planned("--run", str(finished), "--trainer.max_steps", "100000")
    assert contents(finished) == before
    assert told["start"] == "from step-00000012.ckpt"
    assert told["steps"].startswith(
        "100,000 of 8 samples (devices 1 x micro-batches 1 x 8), 99,988 of them left"
    )
    speed = re.match(r"([\d.]+) (minutes|hours), .* at ([\d,]+) tokens/s: as this run was", told["time"])
    assert speed is not None
    seconds = float(speed[1]) * {"minutes": 60, "hours": 3600}[speed[2]]
    assert seconds == pytest.approx(99_988 * 8 * 32 / float(speed[3].replace(",", "")), rel=0.06)


def test_of_a_finished_run_nothing_is_left(finished: Path, planned: Callable[..., dict[str, str]]) -> None:
    told = planned("--run", str(finished))
    assert told["start"] == "finished already, at step 12: raise --trainer.max_steps"
    assert "0 of them left" in told["steps"]
    assert told["checkpoints"].startswith("none; 0.6 MB each")
    assert told["validation"] == "none; 10 samples"
    assert told["time"] == "none"
    assert planned("--run", str(finished), "--trainer.max_steps", "8")["time"] == "none"


def test_a_single_step_is_told_in_the_singular(planned: Callable[..., dict[str, str]]) -> None:
    told = planned("--checkpoint.every_n_steps", "20", "--data.val_windows", "1")
    assert told["checkpoints"].startswith(
        "1 time, after step 12; 0.6 MB each, 1 checkpoint at once: 0.6 MB, "
    )
    assert told["validation"].endswith("; 1 sample")


def test_the_device_and_its_memory_are_told(
    planned: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "host_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(dry_run, "num_cpus", lambda: 6)
    assert planned()["device"] == "CPU, 6 cores, 24.0 GiB"
    assert " of the 24.0 GiB of a device (estimate: state " in planned()["memory"]
    assert "will not fit" not in planned()
    together = planned("--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert together["device"] == "CPU, 6 cores, 24.0 GiB, shared by 2 processes"
    assert " of the 12.0 GiB of a device" in together["memory"]


def test_the_memory_of_this_machine_is_what_the_kernel_says() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("not Linux")
    total = re.search(r"MemTotal:\s+(\d+) kB", meminfo.read_text())
    assert total is not None
    assert host_bytes() == pytest.approx(int(total[1]) * 1024, rel=0.01)


BOTH = "--data.micro_batch 2 --model.recompute_activations true"
REMEDIES = {
    0.99: "--data.micro_batch 4 or --model.recompute_activations true",
    0.46: "--data.micro_batch 2 or --model.recompute_activations true",
    0.37: "--data.micro_batch 1",
    0.33: BOTH,
    0.20: "a smaller model, or more devices",
}
"""What to type, by how much of the needed memory there is."""


@pytest.mark.parametrize("share", REMEDIES)
def test_a_run_that_will_not_fit_is_told_with_what_to_type(
    share: float, planned: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NetworkConfig(32, 12, 2, vocab_size=384, max_position_embeddings=32)
    needed = estimate_memory(ModelConfig(network), 8, 32).total
    monkeypatch.setattr(dry_run, "host_bytes", lambda: int(share * needed))
    told = planned("--model.network.num_hidden_layers", "12")
    sizes = f"a device needs about {in_memory(needed)} and has {in_memory(share * needed)}"
    assert told["will not fit"] == f"{sizes}; use {REMEDIES[share]}"
    assert list(told)[-1] == "will not fit"


def test_what_is_typed_against_too_little_memory_helps(
    planned: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NetworkConfig(32, 12, 2, vocab_size=384, max_position_embeddings=32)
    there = int(0.33 * estimate_memory(ModelConfig(network), 8, 32).total)
    monkeypatch.setattr(dry_run, "host_bytes", lambda: there)
    assert "will not fit" not in planned("--model.network.num_hidden_layers", "12", *BOTH.split())


@pytest.mark.gpu
def test_a_gpu_is_told_by_its_name_and_sharding_is_offered(
    planned: Callable[..., dict[str, str]],
) -> None:
    gpu = ("--trainer.accelerator", "gpu")
    total = torch.cuda.get_device_properties(0).total_memory
    assert planned(*gpu)["device"] == f"{torch.cuda.get_device_name(0)}, {in_memory(total)}"
    told = planned(*gpu, "--model.network.intermediate_size", "1000000000000")
    assert told["will not fit"].endswith("; use --config fsdp on several GPUs")


def test_where_only_the_peak_is_known_the_assumption_is_told(
    planned: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "peak_flops", lambda device: 1e9)
    told = planned("--trainer.max_steps", "100000")
    flops = re.search(r"([\de+.]+) with its causal half", told["FLOPs"])
    assert flops is not None
    minutes = float(flops[1]) / (0.4 * 1e9) / 60
    assert told["time"].startswith(hours(60 * minutes))
    assert "assumes an MFU of 0.40 (causal)" in told["time"]


def test_too_little_disk_is_told(planned: Callable[..., dict[str, str]]) -> None:
    told = planned("--model.network.intermediate_size", "1000000000000")
    assert told["checkpoints"].endswith(": TOO LITTLE, use a smaller --checkpoint.keep")


@pytest.mark.parametrize(
    "options",
    [
        ["--seed_everything", "5"],
        ["--data.micro_batch", "3"],
        ["--trainer.precision", "16-mixed"],
    ],
    ids=" ".join,
)
def test_a_dry_run_refuses_what_the_run_would(
    options: list[str], finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, refusals = contents(finished), []
    for more in ([], ["--dry_run"]):
        assert main(["fit", *tiny_run(shards, finished, *options, *more)]) == 2
        refusals.append(capsys.readouterr())
    assert refusals[0] == refusals[1]
    assert refusals[1].err.count("\n") == 1
    assert contents(finished) == before


def test_numbers_are_written_as_people_read_them() -> None:
    assert [counted(count, "core") for count in (1, 2000)] == ["1 core", "2,000 cores"]
    assert [steps_text([]), steps_text([1])] == ["none", "1 time, after step 1"]
    assert (
        steps_text(list(range(1000, 144_000, 1000)))
        == "143 times, after steps 1,000, 2,000, 3,000, … 143,000"
    )
    assert [in_memory(size) for size in (3 * 2**20, 2.5 * 2**30)] == ["3.0 MiB", "2.5 GiB"]
    assert [on_disk(size) for size in (3e6, 1.95e12)] == ["3.0 MB", "1,950.0 GB"]
    assert [hours(seconds) for seconds in (120, 90_000)] == ["2 minutes", "25 hours"]


# -- a trial --------------------------------------------------------------------------------------


def test_a_trial_goes_the_whole_road_and_keeps_nothing(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lightning's own made a schedule of one step, whose warm-up of two was refused, and saved nothing."""
    rates: list[float] = []
    saved: list[Path] = []
    training_step, save = Pretraining.training_step, Checkpoints.save

    def watched_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
        rates.append(module.schedule.learning_rate(module.trainer.global_step))
        training_step(module, windows, batch_idx)

    def watched_save(checkpoints: Checkpoints, trainer: object) -> None:
        save(checkpoints, trainer)  # type: ignore[arg-type]
        saved.extend(path.resolve() for path in checkpoints.folder.glob("last.ckpt"))

    monkeypatch.setattr(Pretraining, "training_step", watched_step)
    monkeypatch.setattr(Checkpoints, "save", watched_save)
    options = ["--config", "tensorboard", "--trainer.fast_dev_run", "3"]
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *options)]) == 0
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert saved
    assert not saved[0].exists()
    assert not (tmp_path / "run").exists()
    title = f"a trial of {tmp_path}/run"
    start, first, end, last = capsys.readouterr().err.splitlines()
    assert start == f"{title}: vanilla, 0.1m parameters, from the start"
    assert re.match(r"step 1/3: loss \d\.\d{3}, [\d,]+ tok/s$", first)  # of 3, not of the schedule's 12
    assert re.match(rf"{title}: ended at step 3, held-out loss \d\.\d{{4}} nats$", end)
    assert last == f"{title}: nothing of it is kept; leave --trainer.fast_dev_run out to train"


def test_a_trial_leaves_a_run_as_it_is_and_counts_its_one_step(
    finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lines once named a temporary folder, and the steps of the whole schedule."""
    before = contents(finished)
    assert main(["fit", *tiny_run(shards, finished, "--trainer.fast_dev_run", "true")]) == 0
    assert contents(finished) == before
    told = capsys.readouterr().err
    assert "step 1/1: loss" in told
    assert tempfile.gettempdir() + "/sinktrain-" not in told


def test_a_trial_tells_no_time_left_of_the_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(MetricsTable(tmp_path / "metrics.csv"))
    metrics.latest = {"train/loss": 2.0, "eta_s": 86_400.0}
    trainer: Any = SimpleNamespace(global_step=1, max_steps=2)
    TrialBar(metrics, is_live=False, num_steps=3).on_train_batch_end(trainer)
    assert capsys.readouterr().err == "step 1/2: loss 2.000\n"


def test_a_dry_run_is_of_the_run_where_a_trial_is_asked_for_too(
    planned: Callable[..., dict[str, str]],
) -> None:
    told = planned("--trainer.fast_dev_run", "3")
    assert told["steps"].startswith("12 of 8 samples")
    assert told["validation"] == "3 times, after steps 5, 10, 12; 10 samples"


# -- devices --------------------------------------------------------------------------------------


def test_a_device_whose_optimizer_does_not_clip_is_refused() -> None:
    """On a Mac, ``accelerator: auto`` takes MPS, and the first step once ended in an assertion of torch's."""
    with pytest.raises(ConfigError, match=r"^trainer.accelerator: training on mps is not supported; use"):
        check_device(torch.device("mps"))
    check_device(torch.device("cpu"))
    check_device(torch.device("cuda", 1))


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.torch.cuda, "get_device_name", lambda device: "Tesla T4")
    capability = (7, 5)
    monkeypatch.setattr(checks.torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError) as refused:
        check_precision("bf16-mixed", gpu)
    assert str(refused.value) == (
        "trainer.precision bf16-mixed: the device (Tesla T4) has no bfloat16; use 32-true, or a GPU from "
        "Ampere (compute capability 8.0) on"
    )
    check_precision("32-true", gpu)
    check_precision("bf16-mixed", torch.device("cpu"))
    capability = (8, 6)
    check_precision("bf16-mixed", gpu)
