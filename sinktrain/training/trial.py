"""A trial of the whole road, ``trainer.fast_dev_run``: a few steps, a validation, a checkpoint, nothing kept.

Lightning's own makes ``max_steps`` of it, which would be another schedule, and saves nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from sinktrain.training.metrics import Metrics, ProgressBar

LOG_EVERY_N_STEPS = 1


def trial_settings(num_steps: int) -> dict[str, Any]:
    """The Trainer's settings, in place of those that a whole run has."""
    return {"limit_val_batches": num_steps, "log_every_n_steps": LOG_EVERY_N_STEPS}


class StopAfter(Callback):
    """End training after so many steps; Lightning then validates."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.num_steps:
            trainer.should_stop = True


class TrialBar(ProgressBar):
    """Counts to the end of the trial, where the schedule goes on to ``trainer.max_steps``."""

    def __init__(self, metrics: Metrics, is_live: bool, num_steps: int) -> None:
        super().__init__(metrics, is_live)
        self.num_steps = num_steps

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_start(self._seen(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.metrics.latest.pop("eta_s", None)  # of the whole run
        super().on_train_batch_end(self._seen(trainer))

    def _seen(self, trainer: pl.Trainer) -> Any:
        """What a bar reads of a trainer."""
        steps = {"global_step": trainer.global_step, "max_steps": min(self.num_steps, trainer.max_steps)}
        return SimpleNamespace(**steps, log_every_n_steps=LOG_EVERY_N_STEPS)
