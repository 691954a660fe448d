"""Learning rate by step: warm-up, then cosine or warm-up-stable-decay; a function, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sinktrain.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each optimizer step.

    Args:
        kind: ``cosine`` (Pythia) or ``wsd`` (constant, then a linear decay at the end).
        peak: learning rate after warm-up.
        min_ratio: share of the peak that the decay ends at.
        warmup_steps: linear warm-up; 1% of ``max_steps`` when None, as Pythia has it.
        decay_steps: length of the decay of ``wsd``; 20% of ``max_steps`` when None.
        max_steps: optimizer steps of the whole run.
    """

    kind: Literal["cosine", "wsd"]
    peak: float
    min_ratio: float
    warmup_steps: int | None
    decay_steps: int | None
    max_steps: int

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ConfigError(f"trainer.max_steps is {self.max_steps}; say how many optimizer steps to train")
        if self.warmup >= self.max_steps > 1:
            raise ConfigError(
                f"model.warmup_steps is {self.warmup} of trainer.max_steps {self.max_steps}; "
                "use fewer warm-up steps"
            )
        if min(self.warmup, self.decay) < 0:
            raise ConfigError(
                f"model.warmup_steps {self.warmup} and model.decay_steps {self.decay} must be 0 or more"
            )
        if self.warmup + self.decay > self.max_steps:
            raise ConfigError(
                f"model.warmup_steps {self.warmup} and model.decay_steps {self.decay} exceed "
                f"trainer.max_steps {self.max_steps}; use fewer of them"
            )

    @property
    def warmup(self) -> int:
        return self.max_steps // 100 if self.warmup_steps is None else self.warmup_steps

    @property
    def decay(self) -> int:
        if self.kind == "cosine":
            return self.max_steps - self.warmup
        return self.max_steps // 5 if self.decay_steps is None else self.decay_steps

    def learning_rate(self, step: int) -> float:
        """Learning rate of the optimizer step with this number, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        decay_begins = self.max_steps - self.decay
        if step < decay_begins:
            return self.peak
        progress = min(1.0, (step - decay_begins) / max(1, self.decay))
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * remaining)
