"""Checkpoints: when, under which name, and never half a one."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from sinktrain.errors import ConfigError, TrainingError
from sinktrain.training.checkpoint_file import CheckpointFile
from sinktrain.training.launchers import USER_MISTAKE, leave_together
from sinktrain.training.sharding import GATHERED, is_sharded

LAST = "last.ckpt"
LOG_SPACED = (0, *(2**exponent for exponent in range(10)))
"""Steps of Pythia's first checkpoints; every 1000th follows (EleutherAI/pythia, ``models/*/*.yml``)."""


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save.

    Args:
        every_n_steps: optimizer steps between checkpoints; the last step is always saved.
        keep: newest checkpoints kept, besides those kept for good; all when null.
        log_spaced: save, and keep for good, before the first step (step 0) and after steps 1, 2, 4, …, 512,
            as Pythia does.
        keep_every_n_steps: save every so many steps too, and keep for good; 1000 for Pythia, never when null.
    """

    every_n_steps: int = 1000
    keep: int | None = 2
    log_spaced: bool = False
    keep_every_n_steps: int | None = None

    def is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or self.is_for_good(step)

    def is_for_good(self, step: int) -> bool:
        every = self.keep_every_n_steps
        return (self.log_spaced and step in LOG_SPACED) or (every is not None and step % every == 0)

    def most_at_once(self, max_steps: int) -> int:
        """Checkpoints that lie side by side at the end of a run, the one being written included."""
        first = 0 if self.log_spaced else 1
        saved = [step for step in range(first, max_steps) if self.is_due(step)] + [max_steps]
        for_good = sum(map(self.is_for_good, saved))
        rolling = len(saved) - for_good
        return for_good + (rolling if self.keep is None else min(rolling, self.keep + 1))

    def __post_init__(self) -> None:
        if self.keep_every_n_steps is not None and self.keep_every_n_steps < 1:
            raise ConfigError(
                f"checkpoint.keep_every_n_steps is {self.keep_every_n_steps}; use 1 or more, or null for none"
            )
        if self.every_n_steps < 1 or (self.keep is not None and self.keep < 1):
            raise ConfigError(
                f"checkpoint.every_n_steps {self.every_n_steps} and checkpoint.keep {self.keep} "
                "must be 1 or more"
            )


class Checkpoints(Callback):
    """Save every so many steps, at the end and before a stop; ``last.ckpt`` names the newest whole one.

    A checkpoint is written under a temporary name, flushed, renamed, and only then named ``last``: by
    rank 0 in the background, from a copy of the state, which is all that training waits for.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._file = CheckpointFile()
        self._begun_step = -1

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        trainer.strategy.checkpoint_io = self._file
        self._file.are_copies = GATHERED if is_sharded(trainer.strategy) else frozenset()

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it saved
                _discard(leftover)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 0 and self.settings.log_spaced:
            self.begin(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.settings.is_due(trainer.global_step) and not validation_follows(trainer):
            self.begin(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        is_of_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_of_training and self.settings.is_due(trainer.global_step):
            self.begin(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer)

    def on_exception(self, *_: Any) -> None:
        """Let a save end before others may use the folder; should it fail too, the first problem is told."""
        with suppress(Exception):
            self._file.wait()

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, unless this step has been; every rank must ask for it.

        Raises:
            TrainingError: rank 0 could not write, and all leave; the checkpoint before is whole.
        """
        self.begin(trainer)
        self._wait(trainer)

    def begin(self, trainer: pl.Trainer) -> None:
        """As ``save``, but return when rank 0 has a copy of the state, and leave the rest to its background.

        Raises:
            TrainingError: rank 0 could not write the one that was begun before, and all leave.
        """
        step = trainer.global_step
        if step == self._begun_step:
            return
        self._wait(trainer)
        path = self.folder / _name(step)
        temporary = path.with_name(f".{path.name}.tmp")
        trainer.save_checkpoint(temporary, storage_options=lambda: self._put(temporary, path, step))
        self._begun_step = step

    def _wait(self, trainer: pl.Trainer) -> None:
        exit_code = 0
        problem: Exception | None = None
        try:
            self._file.wait()
        except OSError as error:
            exit_code, problem = USER_MISTAKE, TrainingError(self._what_failed(error))
        except Exception as error:
            exit_code, problem = 1, error
        exit_code = trainer.strategy.broadcast(exit_code)
        if exit_code:
            leave_together(trainer, exit_code, problem)

    def _put(self, temporary: Path, path: Path, step: int) -> None:
        """Give a whole checkpoint its names."""
        if path.is_dir():
            _discard(path)
        os.replace(temporary, path)
        name_last(path)
        self._discard_before(step)

    def _what_failed(self, error: OSError) -> str:
        path, free = self.folder / _name(self._begun_step), shutil.disk_usage(self.folder).free
        return (
            f"{path} could not be written: {error.strerror}; it takes {_megabytes(self._file.num_bytes)} and "
            f"{_megabytes(free)} are free; free some space: {what_continues(self.folder)}"
        )

    def _discard_before(self, last: int) -> None:
        """Keep the newest up to step ``last``."""
        if self.settings.keep is not None:
            saved = [step for step in _saved_steps(self.folder) if step <= last]
            rolling = [step for step in saved if not self.settings.is_for_good(step)]
            for step in rolling[: -self.settings.keep]:
                _discard(self.folder / _name(step))


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether this step is to be saved behind its validation, which a run that continued would leave out.

    Not so the last step: what is left of it when it is cut off is made up for after training.
    """
    interval, step = trainer.val_check_batch, trainer.global_step
    is_due = isinstance(interval, int) and step % interval == 0
    return is_due and trainer.enable_validation and step != trainer.max_steps


def name_last(checkpoint: Path) -> None:
    """Let ``last.ckpt`` beside a checkpoint name it, and force both names to disk."""
    link = checkpoint.with_name(f".{LAST}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    os.replace(link, checkpoint.with_name(LAST))
    _flush(checkpoint.parent)


def what_continues(folder: Path) -> str:
    """The end of a message about a run that stops here."""
    last = folder / LAST
    start = f"continues from {last.resolve().stem}" if last.exists() else "starts again"
    return f"the same command {start}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


_NAME = re.compile(r"step-(\d{8,})\.ckpt$")


def _name(step: int) -> str:
    return f"step-{step:08d}.ckpt"


def _saved_steps(folder: Path) -> list[int]:
    found = (_NAME.match(path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in found if name)


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
