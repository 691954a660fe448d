"""Before a run: what a dry run says and refuses, a trial that keeps nothing, devices that cannot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_shards import tiny_run

from sinktrain.cli import main
from sinktrain.errors import ConfigError
from sinktrain.model.config import PYTHIA, ModelConfig, NetworkConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.training import checks, dry_run
from sinktrain.training.checks import check_device, check_precision
from sinktrain.training.dry_run import Memory, estimate_memory, hours, in_memory, on_disk, steps_text
from sinktrain.training.fsdp import FSDP2Strategy
from sinktrain.training.module import Pretraining
from sinktrain.training.saving import Checkpoints
from sinktrain.training.step import fast_attention

SMALL = ModelConfig(NetworkConfig(64, 3, 4, vocab_size=100, max_position_embeddings=128))


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained its 12 steps; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["fit", *tiny_run(shards, run)]) == 0
    return run


@pytest.fixture
def planned(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, str]]:
    """What a dry run says, by subject."""

    def say(*options: str) -> dict[str, str]:
        assert main(["fit", *tiny_run(shards, tmp_path / "run", *options), "--dry_run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("/run: a dry run; nothing is written, nothing is trained")
        return dict(line.split(maxsplit=1) for line in lines[1:])

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
    assert told["checkpoints"].startswith("3 times, after steps 4, 8, 12; 0.6 MB each, ")
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
    assert steps_text([1]) == "1 times, after steps 1"
    assert (
        steps_text(list(range(1000, 144_000, 1000)))
        == "143 times, after steps 1,000, 2,000, 3,000, … 143,000"
    )
    assert [in_memory(size) for size in (3 * 2**20, 2.5 * 2**30)] == ["3.0 MiB", "2.5 GiB"]
    assert [on_disk(size) for size in (3e6, 1.95e12)] == ["3.0 MB", "1,950.0 GB"]
    assert [hours(seconds) for seconds in (120, 90_000)] == ["2 minutes", "25 hours"]


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputes", [False, True])
def test_activations_are_those_that_autograd_keeps(recomputes: bool) -> None:
    model = GPTNeoX(SMALL)
    model.recomputes_activations = recomputes
    tokens = torch.zeros(2, 128, dtype=torch.int64)
    not_layers = [*model.parameters(), model.embed_out.weight]
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in not_layers}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    estimate = estimate_memory(SMALL, 2, 128, recomputes=recomputes)
    layer = estimate_memory(SMALL, 2, 128).activations / 3
    expected = estimate.activations - (layer if recomputes else 0)  # recomputed in the backward pass only
    final = 2 * 128 * (2 * 64 + 100) * 4  # the last norm's input and output, and the log-softmax
    assert sum(kept.values()) - final == pytest.approx(expected, rel=0.1)


def test_state_is_16_bytes_a_parameter_and_shards_are_a_devices_part() -> None:
    def memory(**options: object) -> Memory:
        return estimate_memory(ModelConfig(PYTHIA["pythia-160m"]), 4, 2048, is_mixed=True, **options)  # type: ignore[arg-type]

    alone = memory()
    assert alone.state == 16 * 162_322_944
    view, copy = DDPStrategy(gradient_as_bucket_view=True), DDPStrategy()
    assert memory(strategy=view, world_size=4) == alone
    assert memory(strategy=copy, world_size=4).state == 20 * 162_322_944
    assert memory(strategy=FSDP2Strategy(), world_size=4).state == alone.state / 4
    assert memory(strategy=FSDP2Strategy(), world_size=4).activations == alone.activations
    matrices = 12 * 12 * 768**2
    assert memory(is_muon=True).state == alone.state - 4 * matrices
    assert memory(recomputes=True).activations < alone.activations / 5
    assert memory(is_fused=True).logits == 4 * 2048 * 50304 * 2
    assert memory().logits == 4 * 2048 * 50304 * 10


@pytest.mark.slow  # deepspeed takes seconds to import
@pytest.mark.parametrize(("stage", "part"), [(1, (4 + 4 + 2) / 16), (2, (4 + 1 + 2) / 16), (3, 1 / 4)])
def test_each_zero_stage_shards_more(stage: int, part: float) -> None:
    pytest.importorskip("deepspeed")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    sharded = estimate_memory(SMALL, 1, 128, strategy=DeepSpeedStrategy(stage=stage), world_size=4)
    assert sharded.state == part * estimate_memory(SMALL, 1, 128).state


@pytest.mark.gpu
def test_estimated_memory_is_near_the_peak_on_a_gpu() -> None:
    config = ModelConfig(PYTHIA["pythia-70m"])
    model = GPTNeoX(config).cuda()
    model.compile(dynamic=False)
    tokens = torch.zeros(16, 2048, dtype=torch.int64, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with fast_attention(), torch.autocast("cuda", torch.bfloat16):
            model(tokens, tokens).backward()
    estimate = estimate_memory(config, 16, 2048, is_mixed=True, is_fused=True)
    without_moments = estimate.total - estimate.state / 2
    assert torch.cuda.max_memory_allocated() == pytest.approx(without_moments, rel=0.35)


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
    told = capsys.readouterr().err
    assert "held-out loss" in told
    assert told.endswith("trainer.fast_dev_run 3: a trial, of which nothing is kept\n")


def test_a_trial_leaves_a_run_as_it_is(finished: Path, shards: Path) -> None:
    before = contents(finished)
    assert main(["fit", *tiny_run(shards, finished, "--trainer.fast_dev_run", "true")]) == 0
    assert contents(finished) == before


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


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--trainer.devices -1",
            "`devices` selected with `CPUAccelerator` should be an int > 0; sinktrain doctor",
        ),
        ("--trainer.devices 0", "value is not a valid input using cpu accelerator; sinktrain doctor shows"),
        ("--trainer.accelerator tpu", "trainer: Requirement 'torch_xla"),
        ("--trainer.precision bf16-true", "trainer.precision bf16-true is not supported; use bf16-mixed or"),
        ("--trainer.precision transformer-engine", "transformer-engine is not supported; use bf16-mixed or"),
        ("--trainer.fast_dev_run -1", "trainer.fast_dev_run is -1; use true, or a number of steps"),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    options: str, line: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *options.split())]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny_run(shards, tmp_path / "run", "--trainer.accelerator", "gpu")]) == 2
    assert capsys.readouterr().err == (
        "sinktrain fit: trainer: No supported gpu backend found; sinktrain doctor shows the devices\n"
    )


@pytest.mark.gpu
def test_more_gpus_than_there_are_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--trainer.accelerator", "gpu", "--trainer.devices", "64", "--data.global_batch", "64"]
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *many)]) == 2
    told = capsys.readouterr().err
    assert "You requested gpu" in told
    assert told.count("\n") == 1
