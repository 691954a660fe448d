"""A whole optimizer step replayed as one CUDA graph: small models wait for launches more than for the GPU."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sinktrain.training.step import Stepper

if TYPE_CHECKING:
    from sinktrain.training.module import Pretraining

WARM_UP_STEPS = 3
"""Steps that run plainly first: they compile kernels, and make the optimizer's state."""


class GraphedStepper(Stepper):
    """``Stepper`` of one CUDA device, captured once and replayed."""

    def __init__(self, module: Pretraining) -> None:
        super().__init__(module)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain_steps = 0
        self._rate = torch.zeros((), device=self.strategy.root_device)

    def __call__(self, windows: Tensor, learning_rate: float) -> None:
        if self._plain_steps < WARM_UP_STEPS:
            self._plain_steps += 1
            super().__call__(windows, learning_rate)
            return
        if self._graph is None:
            self._capture(windows)
        self._windows.copy_(windows)
        self._rate.fill_(learning_rate)
        cast(Any, self.module.optimizers()).step()  # which replays, and is counted by Lightning

    def _capture(self, windows: Tensor) -> None:
        optimizer = cast(Any, self.module.optimizers()).optimizer
        self._windows = windows.clone()
        graph = torch.cuda.CUDAGraph()
        for group in optimizer.param_groups:
            group.update(lr=self._rate, capturable=True)
        # The thread that reads windows ahead pins memory meanwhile, which the default mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.compute(self._windows)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group.update(capturable=False)  # says something of a capture alone, and is saved
        self._graph = graph
        this: Any = weakref.proxy(self)  # the optimizer may outlive the graph, which holds a step's memory
        optimizer.step = lambda closure=None: this._graph.replay()
