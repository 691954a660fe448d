"""What loggers are told besides metrics: the settings and code of a run, where it goes on, its model."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

import sinktrain
from sinktrain.data.tokenizer import TOKENIZER_FILE
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
