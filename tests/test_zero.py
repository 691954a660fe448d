"""ZeRO 1, 2 and 3 train what one device trains, and their checkpoints are those of one device."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import assert_bitwise_equal, checkpoint, measured
from tiny_shards import start, tiny_run, wait_for
from two_processes import CONSTANT, addresses, assert_close, hold_back_writing, layout, processes_of

from sinktrain.cli import main
from sinktrain.errors import ConfigError
from sinktrain.training import guard, zero
from sinktrain.training.fit import fit, validate
from sinktrain.training.module import Pretraining
from sinktrain.training.sharding import GATHERED
from sinktrain.training.zero import ZeroStrategy, check_device, share

MICRO = ["--data.micro_batch", "2"]
BF16 = ["--trainer.precision", "bf16-mixed"]


def overlay(stage: int, devices: int = 1) -> list[str]:
    return ["--config", f"deepspeed-zero{stage}", "--trainer.devices", str(devices)]


@pytest.fixture
def deepspeed() -> Iterator[Any]:
    """The package, where it is installed; leaves nothing of its process group to other tests."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    package = pytest.importorskip("deepspeed", reason="sinktrain[deepspeed] is not installed")
    environment = dict(os.environ)
    yield package
    if package.comm.is_initialized():
        package.comm.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


needs_deepspeed = pytest.mark.usefixtures("deepspeed")
one_fast_stage = pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
every_stage = pytest.mark.parametrize("stage", [1, 2, 3])


# -- one process ----------------------------------------------------------------------------------


@needs_deepspeed
@one_fast_stage
def test_a_run_goes_from_zero_to_one_device_and_back_and_equals_one_device(
    stage: int, whole: Path, train_for: Callable[..., Path]
) -> None:
    first = train_for("parts", 5, *overlay(stage), *MICRO)
    assert layout(checkpoint(first)["optimizer_states"]) == layout(checkpoint(whole)["optimizer_states"])
    train_for("parts", 8)
    assert_close(whole, train_for("parts", 12, *overlay(stage), "--data.micro_batch", "1"))


@needs_deepspeed
@one_fast_stage
def test_steps_taken_while_a_checkpoint_is_written_do_not_change_it(
    stage: int, train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is there a second copy of what was gathered."""
    expected = checkpoint(train_for("expected", 6, *overlay(stage)), "step-00000004.ckpt")
    real, gathered = ZeroStrategy._whole, []

    def whole(*what: Any) -> torch.Tensor:
        gathered.append(real(*what))
        return gathered[-1]

    monkeypatch.setattr(ZeroStrategy, "_whole", whole)
    handed_over = hold_back_writing(monkeypatch)
    found = checkpoint(train_for("found", 6, *overlay(stage)), "step-00000004.ckpt")
    assert_bitwise_equal(expected, found)
    steps = {state["step"].data_ptr() for state in handed_over[0]["optimizer_states"][0]["state"].values()}
    for key in GATHERED:
        assert addresses(handed_over[0][key]) <= addresses(gathered) | steps


@needs_deepspeed
@pytest.mark.slow
@every_stage
def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(
    stage: int, train_for: Callable[..., Path]
) -> None:
    plain, sharded = (
        train_for("plain", 12, *BF16, *MICRO),
        train_for("sharded", 12, *BF16, *MICRO, *overlay(stage)),
    )
    assert measured(sharded, "train/loss") == pytest.approx(measured(plain, "train/loss"), abs=2e-3)
    assert measured(sharded, "grad_norm") == pytest.approx(measured(plain, "grad_norm"), rel=5e-3)
    expected, found = checkpoint(plain), checkpoint(sharded)
    assert layout(expected["state_dict"]) == layout(found["state_dict"])
    moved = max(float((w - w.bfloat16().float()).abs().max()) for w in found["state_dict"].values())
    assert moved > 0, "the saved weights are those that DeepSpeed computes with, rounded to bfloat16"
    differences = [(w - found["state_dict"][name]).abs().max() for name, w in expected["state_dict"].items()]
    assert max(differences) < 0.01, f"{max(differences):.1e}"


@needs_deepspeed
@pytest.mark.slow
@every_stage
@pytest.mark.parametrize("precision", [[], BF16])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(
    stage: int, precision: list[str], train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the initial ones: so this also shows that those are the same, bit for bit, in float32."""
    real = Pretraining.mean_loss
    monkeypatch.setattr(Pretraining, "mean_loss", lambda *of, **more: real(*of, **more) * float("nan"))
    saved = [
        checkpoint(train_for("plain", 3)),
        checkpoint(train_for("sharded", 3, *overlay(stage), *MICRO, *precision)),
    ]
    monkeypatch.undo()
    assert_bitwise_equal(saved[0]["state_dict"], saved[1]["state_dict"])
    assert int(saved[1]["sinktrain"]["guard"]["_skipped"]) == 3
    assert float(saved[1]["optimizer_states"][0]["state"][0]["step"]) == 0


@needs_deepspeed
@one_fast_stage
def test_a_spike_is_skipped_as_on_one_device(
    stage: int, train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pretraining.mean_loss

    def mean_loss(module: Pretraining, windows: torch.Tensor, rows: int) -> torch.Tensor:
        return real(module, windows, rows) * (50.0 if module.trainer.global_step == 6 else 1.0)

    monkeypatch.setattr(guard, "WINDOW", 8)
    monkeypatch.setattr(Pretraining, "mean_loss", mean_loss)
    plain, sharded = (checkpoint(train_for(name, 8, *more)) for name, more in (
        ("plain", []), ("sharded", [*overlay(stage), *MICRO])
    ))  # fmt: skip
    monkeypatch.undo()
    expected, found = plain["sinktrain"]["guard"], sharded["sinktrain"]["guard"]
    assert int(expected["_skipped"]) == int(found["_skipped"]) == 1
    torch.testing.assert_close(found, expected)  # the spike is among the losses that later ones meet
    assert float(sharded["optimizer_states"][0]["state"][0]["step"]) == 7
    torch.testing.assert_close(sharded["state_dict"], plain["state_dict"], rtol=0, atol=1e-5)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_validate_scores_what_one_device_wrote(stage: int, whole: Path, shards: Path, tmp_path: Path) -> None:
    last = ["--ckpt_path", str(whole / "checkpoints" / "last.ckpt")]
    found = validate(tiny_run(shards, tmp_path / "none", *CONSTANT, *overlay(stage), *last))
    assert found["val/loss"] == pytest.approx(measured(whole, "val/loss")[12], rel=1e-6)


@needs_deepspeed
@pytest.mark.slow
@every_stage
def test_a_run_cut_off_after_its_last_step_is_validated_and_finished(
    stage: int, train_for: Callable[..., Path]
) -> None:
    run = train_for("run", 3, *overlay(stage))
    manifest = run / "manifest.json"
    finished = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(finished | {"is_finished": False}))
    train_for("run", 3, *overlay(stage))
    found = json.loads(manifest.read_text())
    assert found["is_finished"]
    assert found["val_loss_nats"] == pytest.approx(finished["val_loss_nats"], rel=1e-6)


@needs_deepspeed
@pytest.mark.gpu
@every_stage
def test_on_cuda_zero_trains_as_one_device_and_each_continues_the_other(
    stage: int, train_for: Callable[..., Path]
) -> None:
    # an eps below which AdamW does not blow up what rounding does to gradients near 0
    cuda = ["--trainer.accelerator", "gpu", *BF16, *MICRO, "--model.eps", "1e-4"]
    plain = train_for("plain", 12, *cuda)
    train_for("parts", 5, *cuda, *overlay(stage))
    train_for("parts", 8, *cuda)
    parts = train_for("parts", 12, *cuda, *overlay(stage))
    assert measured(parts, "train/loss") == pytest.approx(measured(plain, "train/loss"), abs=2e-2)
    expected, found = checkpoint(plain), checkpoint(parts)
    assert layout(expected["state_dict"]).keys() == layout(found["state_dict"]).keys()
    differences = [
        (w.cpu() - found["state_dict"][name].cpu()).abs().max() for name, w in expected["state_dict"].items()
    ]
    assert max(differences) < 0.02, f"{max(differences):.1e}"


# -- two processes --------------------------------------------------------------------------------

# Biases of MLPs that do not divide by two: the ranks' shards differ in size.
UNEVEN = ["--config", "sink", "--model.network.intermediate_size", "63"]


@needs_deepspeed
@pytest.mark.slow  # two processes import lightning one after the other
@every_stage
def test_one_process_then_two_then_one_equal_one_process(
    stage: int, shards: Path, train_for: Callable[..., Path]
) -> None:
    """Steps 1-6 on one process, 7-12 on two with micro-batches, 13-16 on one."""
    whole = train_for("whole", 16, *UNEVEN)
    parts = train_for("parts", 6, *UNEVEN)
    steps = ["--trainer.max_steps", "12", *MICRO]
    process = start(tiny_run(shards, parts, *CONSTANT, *UNEVEN, *overlay(stage, devices=2), *steps))
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert told.count("from step-00000006.ckpt") == 1, told  # said by rank 0 alone
    assert told.count("finished at step 12") == 1, told
    assert_close(whole, train_for("parts", 16, *UNEVEN))


@needs_deepspeed
@pytest.mark.slow
def test_sigterm_to_the_second_process_stops_both_and_saves(
    shards: Path, tmp_path: Path, train_for: Callable[..., Path]
) -> None:
    rare = ["--checkpoint.every_n_steps", "100000", "--trainer.val_check_interval", "100000"]
    steps = ["--trainer.max_steps", "100000", *rare]
    process = start(tiny_run(shards, tmp_path / "parts", *CONSTANT, *overlay(2, devices=2), *steps))
    wait_for(20, tmp_path / "parts", process)
    os.kill(processes_of(process.pid)[1], signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143, told
    assert told.count("stopped by SIGTERM and saved; the same command continues") == 1, told
    end = checkpoint(tmp_path / "parts")["global_step"] + 4
    assert_close(train_for("whole", end, *rare), train_for("parts", end, *rare))


# -- parts and messages ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_shares_make_the_whole_and_zeros(ranks: int) -> None:
    whole = torch.arange(1.0, 11.0).view(2, 5)
    size = -(-whole.numel() // ranks)
    joined = torch.cat([share(whole, size, rank) for rank in range(ranks)])
    assert joined.tolist() == [*range(1, 11), *[0] * (size * ranks - 10)]


def test_without_deepspeed_one_line_says_how_to_install_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *overlay(2))]) == 2
    told = capsys.readouterr().err
    assert "pip install 'sinktrain[deepspeed]'" in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_device_that_deepspeed_has_not_chosen_is_refused_with_both_remedies() -> None:
    check_device("cuda", "cuda")
    with pytest.raises(ConfigError, match=r"trainer.accelerator is cpu, .* set DS_ACCELERATOR=cpu in"):
        check_device("cpu", "cuda")


@needs_deepspeed
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.compile", "true"], "model.compile is true, but ZeRO stage 3 .*; leave it out"),
        (
            ["--model.optimizer", "muon"],
            "model.optimizer muon needs whole matrices, which ZeroStrategy shards",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    options: list[str], told: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        fit(tiny_run(shards, tmp_path / "run", *overlay(3), *options))
    assert not (tmp_path / "run").exists()
