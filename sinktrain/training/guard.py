"""Steps that would do harm are left out: a loss or gradient that is not finite, or a loss that spikes.

Judged on the device, without waiting for it: what comes out is the flag that fused optimizers take as
``found_inf``. The rule is that of OLMo-core's ``optim/skip_step_optimizer.py`` (a loss above mean + 6
standard deviations of the last 128), but losses that are not finite never enter the window: there, one
NaN makes every comparison false.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 128
"""Losses that a new one is compared with; none is called a spike before half of them are there."""


class SpikeGuard:
    """Decides, step by step, whether the optimizer may use a gradient.

    Args:
        sigma: standard deviations above the mean from which a loss is a spike; None: only what is not
            finite is skipped.
        device: where losses and gradients are.
    """

    def __init__(self, sigma: float | None, device: torch.device) -> None:
        self.sigma = sigma
        self._losses = torch.zeros(WINDOW, dtype=torch.float32, device=device)
        self._places = torch.arange(WINDOW, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to skip this step, as float32[] on the device: 1 skips, 0 does not.

        Args:
            loss: float[], mean over the global batch: the same on every rank.
            grad_norm: float[], before clipping.
        """
        loss = loss.to(torch.float32)
        is_finite = loss.isfinite() & grad_norm.isfinite()
        skip = ~is_finite
        if self.sigma is not None:
            skip = skip | self._is_spike(loss, self.sigma)
        is_next = self._places == self._count % WINDOW  # an index would make the host wait for it
        self._losses.copy_(torch.where(is_next & is_finite, loss, self._losses))
        self._count += is_finite
        self._skipped += skip
        self._in_a_row.add_(1).mul_(skip)
        return skip.to(torch.float32)

    def _is_spike(self, loss: Tensor, sigma: float) -> Tensor:
        is_known = self._places < self._count
        count = self._count.clamp(min=2, max=WINDOW)
        mean = self._losses.sum() / count  # places not yet taken hold 0
        variance = ((self._losses - mean) ** 2 * is_known).sum() / (count - 1)
        return (self._count >= WINDOW // 2) & (loss > mean + sigma * variance.sqrt())

    @property
    def skipped(self) -> int:
        """Steps skipped in this run; waits for the device."""
        return int(self._skipped)

    @property
    def skipped_in_a_row(self) -> int:
        """Steps skipped since the last that was not; waits for the device."""
        return int(self._in_a_row)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).cpu() for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            getattr(self, name).copy_(state[name])


_STATE = ("_losses", "_count", "_skipped", "_in_a_row")
