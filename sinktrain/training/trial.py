"""A trial of the whole road, ``trainer.fast_dev_run``: a few steps, a validation, a checkpoint, nothing kept.

Lightning's own makes ``max_steps`` of it, which would be another schedule, and saves nothing.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def trial_settings(num_steps: int) -> dict[str, Any]:
    """The Trainer's settings, in place of those that a whole run has."""
    return {
        "fast_dev_run": False,
        "limit_val_batches": num_steps,
        "log_every_n_steps": 1,
    }


class StopAfter(Callback):
    """End training after so many steps; Lightning then validates."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.num_steps:
            trainer.should_stop = True
