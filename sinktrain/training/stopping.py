"""Clean stops: a signal ends training after the step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from sinktrain.training.saving import Checkpoints


class Stopped(BaseException):
    """Training was told to stop and has saved; ``signum`` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopOnSignal(Callback):
    """On Ctrl-C or SIGTERM: finish the step, agree with the other ranks, save, leave.

    The handler only sets a flag. Lightning 2.6.6's own broadcasts inside the handler, which waits for
    ever when a rank other than 0 gets the signal.
    """

    AGREE_EVERY_N_STEPS = 8

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._signum = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, *_: Any) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)

    def on_train_end(self, *_: Any) -> None:
        self._restore_handlers()

    def on_exception(self, *_: Any) -> None:
        self._restore_handlers()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        signum = self._agreed_signal(trainer)
        if signum:
            self.checkpoints.save(trainer)
            raise Stopped(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum and signum == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self._signum = signum

    def _agreed_signal(self, trainer: pl.Trainer) -> int:
        if trainer.world_size == 1:
            return self._signum
        if trainer.global_step % self.AGREE_EVERY_N_STEPS:
            return 0
        signum = torch.tensor(self._signum, device=trainer.strategy.root_device)
        return int(cast(torch.Tensor, trainer.strategy.reduce(signum, reduce_op="max")))

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
