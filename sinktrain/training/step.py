"""One optimizer step, from windows to weights; nothing in it waits for the device.

``Stepper`` is for one device and for DDP. What shards weights, gradients or the optimizer has a stepper
of its own (``sinktrain.training.fsdp``, ``sinktrain.training.zero_step``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from sinktrain.training.guard import SpikeGuard

if TYPE_CHECKING:
    from sinktrain.training.module import Pretraining

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,  # forward and backward 1.5 times as fast as FlashAttention 2 on an H100
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Kernels of causal attention, the fastest first; torch passes over those that cannot take an input."""


def fast_attention() -> AbstractContextManager[None]:
    return cast(AbstractContextManager[None], sdpa_kernel(ATTENTION, set_priority=True))


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum in place; Lightning's own has a barrier in it, which waits for the device."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


class Stepper:
    """Gradients of a rank's share of a global batch, clipped, judged and applied.

    Args:
        module: what is trained; its optimizer exists already.

    ``loss`` (mean over the global batch, in nats) and ``grad_norm`` (before clipping) are those of the
    last step, on the device.
    """

    def __init__(self, module: Pretraining) -> None:
        self.module = module
        self.strategy: Any = module.trainer.strategy
        self.guard = SpikeGuard(module.spike_sigma, self.strategy.root_device)
        self.loss: Tensor | None = None
        self.grad_norm: Tensor | None = None

    def __call__(self, windows: Tensor, learning_rate: float) -> None:
        """Train on int64[rows, seq + 1]."""
        optimizer = cast(Any, self.module.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self.compute(windows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def compute(self, windows: Tensor) -> None:
        """Leave gradients for the optimizer: it clips them as it reads them, and skips a step if told so."""
        with fast_attention():
            local_loss = self.accumulate(windows)
        self.loss = self.mean_over_ranks(local_loss)
        self.grad_norm = self.norm()
        optimizer = cast(Any, self.module.optimizers()).optimizer
        optimizer.grad_scale = (self.grad_norm / self.module.clip_norm).clamp(min=1.0)
        optimizer.found_inf = self.guard.judge(self.loss, self.grad_norm)

    def accumulate(self, windows: Tensor) -> Tensor:
        """Add up the gradients of all micro-batches; returns the rank's mean loss, float[]."""
        micro_batches = torch.split(windows, self.module.rows_at_once)
        losses = []
        for number, micro_batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with nullcontext() if is_last else self.no_gradient_sync():
                loss = self.module.mean_loss(micro_batch, rows=len(windows))
                self.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def backward(self, loss: Tensor) -> None:
        self.module.manual_backward(loss)

    def no_gradient_sync(self) -> AbstractContextManager[None]:
        """Keeps the gradients of a micro-batch to their rank until the last one's are there."""
        block = getattr(self.strategy, "block_backward_sync", nullcontext)
        return cast(AbstractContextManager[None], block())

    def mean_over_ranks(self, loss: Tensor) -> Tensor:
        return sum_over_ranks(loss) / self.module.trainer.world_size

    def norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, float[]."""
        return get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None], foreach=True)
