"""Checkpoints: when, under which name, and never half a one."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from sinktrain.errors import ConfigError

LAST = "last.ckpt"


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save.

    Args:
        every_n_steps: optimizer steps between checkpoints; the last step is always saved.
        keep: newest checkpoints kept; all when null.
    """

    every_n_steps: int = 1000
    keep: int | None = 1

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or (self.keep is not None and self.keep < 1):
            raise ConfigError(
                f"checkpoint.every_n_steps {self.every_n_steps} and checkpoint.keep {self.keep} "
                "must be 1 or more"
            )


class Checkpoints(Callback):
    """Save every so many steps, at the end and before a stop; ``last.ckpt`` names the newest whole one.

    A checkpoint is written under a temporary name, flushed, renamed, and only then named ``last``.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it saved
                _discard(leftover)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.settings.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        name = f"step-{trainer.global_step:08d}.ckpt"
        temporary = self.folder / f".{name}.tmp"
        trainer.save_checkpoint(temporary)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            _flush(temporary)
            if (self.folder / name).is_dir():
                _discard(self.folder / name)
            os.replace(temporary, self.folder / name)
            self._name_last(name)
            self._discard_before(name)
        trainer.strategy.barrier()

    def _name_last(self, name: str) -> None:
        link = self.folder / f".{LAST}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self.folder / LAST)
        _flush(self.folder)

    def _discard_before(self, last: str) -> None:
        """Keep the newest up to ``last``; later ones stay, which a run left behind by going back."""
        if self.settings.keep is not None:
            names = sorted(path.name for path in self.folder.glob("step-*.ckpt"))
            for old in names[: names.index(last) + 1][: -self.settings.keep]:
                _discard(self.folder / old)


def _flush(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
