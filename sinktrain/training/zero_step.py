"""A step under DeepSpeed's ZeRO: its engine does the work, and our guard has the say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sinktrain.training.guard import SpikeGuard
from sinktrain.training.step import Stepper, fast_attention

if TYPE_CHECKING:
    from sinktrain.training.module import Pretraining


class LossGuard(SpikeGuard):
    """A ``SpikeGuard`` that can tell of a loss alone, before there is a gradient."""

    def is_harmful(self, loss: Tensor) -> Tensor:
        """Whether the step of this loss, float[], will be skipped whatever its gradient: bool[]."""
        loss = loss.to(torch.float32)
        is_harmful = ~loss.isfinite()
        return is_harmful if self.sigma is None else is_harmful | self._is_spike(loss, self.sigma)


class ZeroStepper(Stepper):
    """DeepSpeed accumulates, exchanges, clips and applies; micro-batches are its accumulation steps.

    DeepSpeed skips a step by itself where the gradient is not finite. A spike is known before the last
    micro-batch's backward pass, whose loss is then multiplied by NaN: so DeepSpeed skips that step too.
    We wait for the device nowhere; DeepSpeed does once a step, to look at its norm. ``grad_norm`` of a
    skipped step is infinite.
    """

    def __init__(self, module: Pretraining) -> None:
        super().__init__(module)
        self.guard: LossGuard = LossGuard(module.spike_sigma, self.strategy.root_device)

    def __call__(self, windows: Tensor, learning_rate: float) -> None:
        """Train on int64[rows, seq + 1]."""
        engine, optimizer = self.strategy.deepspeed_engine, cast(Any, self.module.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with fast_attention():
            *earlier, last = torch.split(windows, self.module.rows_at_once)
            losses = []
            for micro_batch in earlier:
                loss = self.forward(micro_batch, len(windows))
                self.backward(loss)
                engine.step()
                losses.append(loss.detach())
            loss = self.forward(last, len(windows))
            self.loss = self.mean_over_ranks(torch.stack([*losses, loss.detach()]).sum())
            is_harmful = self.guard.is_harmful(self.loss)
            self.backward(loss * torch.where(is_harmful, torch.nan, 1.0))
        optimizer.step()  # counted by Lightning, which calls engine.step()
        norm = engine.get_global_grad_norm()
        self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.loss.device)
        self.guard.judge(self.loss, self.grad_norm.where(~is_harmful, 0.0))

    def forward(self, micro_batch: Tensor, rows: int) -> Tensor:
        """``Pretraining.mean_loss``, called through DeepSpeed's engine as its hooks want it."""
        redirect = self.strategy._forward_redirection
        return cast(Tensor, redirect(self.strategy.model, self.module, "mean_loss", micro_batch, rows))

    def backward(self, loss: Tensor) -> None:
        """Undo DeepSpeed's division by the number of micro-batches: the loss is a share of the mean already.

        Its own switch for that (``scale_wrt_gas``) divides all the same, in version 0.19.8 and stage 1.
        """
        self.module.manual_backward(loss * self.strategy.deepspeed_engine.gradient_accumulation_steps())
