"""Loggers: where their files go, and what they are told besides metrics: settings, code, the model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

import sinktrain
from sinktrain.data.tokenizer import TOKENIZER_FILE
from sinktrain.errors import ConfigError
from sinktrain.training.run import RunFolder


class LoggedRun(Callback):
    """Tells every logger the settings once a start, and uploads the model of the last checkpoint.

    Args:
        settings: of the run, resolved, nested.
        run: whose last checkpoint is uploaded, after ``Checkpoints`` has written it.
        uploads_model: to Weights & Biases, as an artifact.
    """

    def __init__(self, settings: dict[str, Any], run: RunFolder, uploads_model: bool) -> None:
        self.settings = settings
        self.run = run
        self.uploads_model = uploads_model

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            settings = {**self.settings, "code": code_version()}
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    _log_settings_to_tensorboard(logger, settings)
                else:
                    logger.log_hyperparams(settings)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and self.uploads_model:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    _upload_model(logger, self.run)


LOGGER_REMEDY = "--config wandb or --config tensorboard"


def place_loggers(loggers: Any, run: RunFolder, run_id: str) -> bool:
    """Keep the loggers' files in the run folder, and a continued run in the same W&B run.

    Args:
        loggers: ``trainer.logger`` as it was parsed, changed in place.

    Returns:
        Whether W&B is to have the model.

    Raises:
        ConfigError: a logger whose package is not here, or with settings that would not do.
    """
    if loggers is True:  # Lightning's choice, which begins another log at every start
        raise ConfigError(f"trainer.logger true is not supported; use {LOGGER_REMEDY}")
    described = [
        logger
        for logger in (loggers if isinstance(loggers, list) else [loggers])
        if hasattr(logger, "class_path")
    ]
    for logger in described:
        _place(logger, run, run_id)
    return any(map(_uploads_model, described))


def forget_after(logger: Logger, step: int) -> None:
    """Have what was logged after a step not shown, which a run that continues from there logs again.

    Only TensorBoard can: in Weights & Biases those steps have two points.
    """
    if isinstance(logger, TensorBoardLogger):
        from tensorboard.compat.proto import event_pb2

        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        logger.experiment.file_writer.add_event(event_pb2.Event(session_log=start), step=step + 1)


def code_version() -> dict[str, str]:
    """The package's version, and its commit where it runs from its repository."""
    version = {"version": sinktrain.__version__}
    root = Path(sinktrain.__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return version
        version["commit"] = described.stdout.strip()
    return version


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _place(logger: Any, run: RunFolder, run_id: str) -> None:
    name = logger.class_path.rpartition(".")[2]
    if name == "WandbLogger":
        _need("wandb", "pip install 'sinktrain[wandb]'")
        placed = {"name": run.path.name, "id": run_id}
    elif name == "TensorBoardLogger":
        _need("tensorboard", "pip install tensorboard")
        placed = {"name": "tensorboard", "version": ""}
    else:
        return
    for key, value in {"save_dir": str(run.path), **placed}.items():
        logger.init_args[key] = value


def _uploads_model(logger: Any) -> bool:
    """Whether W&B is to have the model: Lightning's setting, which without its checkpoints does nothing."""
    settings = logger.get("init_args") or {}
    if not logger.class_path.endswith("WandbLogger"):
        return False
    log_model = settings.get("log_model", False)
    if log_model not in (True, False):
        raise ConfigError(f"trainer.logger: log_model {log_model} is not supported; use true (the last one)")
    if log_model and settings.get("offline"):
        raise ConfigError(
            "trainer.logger: log_model and offline do not go together; "
            "leave offline out and set WANDB_MODE=offline, and `wandb sync` uploads both"
        )
    return bool(log_model)


def _need(package: str, remedy: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"trainer.logger needs the package {package}; {remedy}, or leave that overlay out")


def _log_settings_to_tensorboard(logger: TensorBoardLogger, settings: dict[str, Any]) -> None:
    """Settings beside ``val/loss`` in the HPARAMS tab; Lightning's way adds a made-up metric."""
    from torch.utils.tensorboard import summary

    plain = {
        name: value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in flat(settings).items()
    }
    make: Any = summary.hparams
    for part in make(plain, {"val/loss": 0.0}):
        logger.experiment.file_writer.add_summary(part)


def wandb_url(loggers: Iterable[Logger]) -> str | None:
    """The run's page at W&B; None without that logger, and offline."""
    runs = [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
    return next((run.url for run in runs if not run.offline), None)


def _upload_model(logger: WandbLogger, run: RunFolder) -> None:
    """A folder that every command takes as a MODEL: the last checkpoint, less what only training needs."""
    import wandb

    checkpoint = torch.load(run.last, map_location="cpu", weights_only=True, mmap=True)
    artifact = wandb.Artifact(name=f"model-{logger.experiment.id}", type="model")
    with artifact.new_file(f"checkpoints/{run.last.name}", mode="wb") as file:
        torch.save({key: checkpoint[key] for key in checkpoint if key != "optimizer_states"}, file)
    if (run.path / TOKENIZER_FILE).exists():
        artifact.add_file(str(run.path / TOKENIZER_FILE))
    logger.experiment.log_artifact(artifact)
