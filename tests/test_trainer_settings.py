"""Settings that would not do are refused in one line: what was typed, what is wrong, what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_shards import tiny_run

from sinktrain.cli import main
from sinktrain.errors import ConfigError
from sinktrain.training import trainer_settings
from sinktrain.training.trainer_settings import check_trainer

STRATEGIES = "use auto or ddp, or --config fsdp, deepspeed-zero1, -zero2 or -zero3"
PRECISIONS = "is not supported; use bf16-mixed or 32-true"
LOGGERS = "is not supported; use --config wandb or --config tensorboard"
PROCESSES = "is not a number of processes on the CPU; use 1 or more"

REFUSALS = {
    "--trainer.devices 0": f"trainer.devices 0 {PROCESSES}",
    "--trainer.devices 3.5": f"trainer.devices 3.5 {PROCESSES}",
    "--trainer.devices -1": f"trainer.devices -1 {PROCESSES}",
    "--trainer.devices [0,1]": f"trainer.devices [0, 1] {PROCESSES}",
    "--trainer.accelerator foo": "trainer.accelerator foo is not supported; use auto, cpu or gpu",
    "--trainer.accelerator gpo": (
        'trainer.accelerator gpo is not supported; use auto, cpu or gpu; did you mean "gpu"?'
    ),
    "--trainer.strategy foo": f"trainer.strategy foo is not supported; {STRATEGIES}",
    "--trainer.strategy dpp": f'trainer.strategy dpp is not supported; {STRATEGIES}; did you mean "ddp"?',
    "--trainer.max_steps -5": "trainer.max_steps -5 is not supported; use 1 or more",
    "--trainer.fast_dev_run -1": "trainer.fast_dev_run is -1; use true, or a number of steps",
    "--trainer.precision bf17": f"trainer.precision bf17 {PRECISIONS}",
    "--trainer.precision transformer-engine": f"trainer.precision transformer-engine {PRECISIONS}",
    "--trainer.logger wandb": f"trainer.logger wandb {LOGGERS}",
    "--trainer.logger true": f"trainer.logger true {LOGGERS}",
    "--trainer.log_every_n_steps x": 'setting "trainer.log_every_n_steps": expected int, null, found x',
    "--trainer.callbacks foo": (
        'setting "trainer.callbacks": expected list[Callback], Callback, null, found foo'
    ),
    "--model.optimizer adamx": 'model.optimizer "adamx" is not one of adamw, muon; did you mean "adamw"?',
    # what is left to Lightning
    "--trainer.reload_dataloaders_every_n_epochs -1": (
        "trainer: reload_dataloaders_every_n_epochs should be an int >= 0, got -1"
    ),
    # all in one go
    "--trainer.max_time 3 --trainer.num_nodes 0 --trainer.limit_val_batches 1.5 --trainer.accelerator tpu": (
        "trainer.max_time 3 is not supported; use DD:HH:MM:SS, such as 00:11:30:00; "
        "trainer.num_nodes 0 is not supported; use 1 or more; "
        "trainer.limit_val_batches 1.5 is not supported; use a number of batches, a share such as 0.5, "
        "or 0 for no validation; "
        "trainer.accelerator tpu is not supported; use auto, cpu or gpu"
    ),
}


@pytest.mark.parametrize("options", REFUSALS)
def test_a_setting_that_would_not_do_is_one_line(
    options: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *options.split())]) == 2
    assert capsys.readouterr().err == f"sinktrain fit: {REFUSALS[options]}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_one_line(
    name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny_run(shards, tmp_path / "run", "--trainer.accelerator", name)]) == 2
    assert capsys.readouterr().err == (
        f"sinktrain fit: trainer.accelerator {name}: torch finds no GPU here; use --trainer.accelerator cpu "
        "(sinktrain doctor shows the devices)\n"
    )


def checked_on(num_gpus: int, devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_settings.torch.cuda, "device_count", lambda: num_gpus)
    check_trainer({"accelerator": "gpu", "devices": devices, "strategy": "auto"})


@pytest.mark.parametrize("devices", ["auto", 1, "2", 4, -1, "-1", [0], [3, 1], "0,3", "2,"])
def test_gpus_that_are_there_are_taken(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_on(4, devices, monkeypatch)


@pytest.mark.parametrize("devices", [0, 5, "64", "3.5", -2, [], [4], [1, 1], "0,4", "1,1", "0,x", "x"])
def test_gpus_that_are_not_there_are_one_line(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        checked_on(4, devices, monkeypatch)
    assert str(refused.value) == (
        f"trainer.devices {devices}: this machine has 4 GPUs; use 1 to 4, -1 for all, or some such as 0,3"
    )
    with pytest.raises(ConfigError, match=r"this machine has 1 GPU; use 1$"):
        checked_on(1, devices, monkeypatch)


def test_what_torchrun_started_counts_in_place_of_the_gpus_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may show each process a GPU of its own, of which there is one."""
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "4")
    checked_on(1, 4, monkeypatch)


@pytest.mark.gpu
def test_more_gpus_than_there_are_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--trainer.accelerator", "gpu", "--trainer.devices", "64", "--data.global_batch", "64"]
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *many)]) == 2
    told = capsys.readouterr().err
    assert "trainer.devices 64: this machine has" in told
    assert told.count("\n") == 1
