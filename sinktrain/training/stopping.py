"""Clean stops: a signal, or too many skipped steps, end training after a step, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from sinktrain.errors import TrainingError
from sinktrain.training.launchers import STOP_SIGNALS, USER_MISTAKE, leave_together
from sinktrain.training.module import Pretraining
from sinktrain.training.saving import Checkpoints, validation_follows, what_continues


class Stopped(BaseException):
    """Training was told to stop and has saved; ``signum`` says by which signal. Raised on rank 0 alone."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopOnSignal(Callback):
    """On Ctrl-C, SIGTERM or SIGUSR1: finish the step, agree with the other ranks, save, leave.

    SIGUSR1 is what SLURM sends ahead of the time limit when asked to (``--signal=USR1@120``). The exit
    code is 128 + the signal's number, as shells have it (130, 143, 138): so a job script can tell a run
    that ran out of time, which it may submit again, from one that somebody cancelled.

    The handler only sets a flag. Lightning 2.6.6's own broadcasts inside the handler, which waits for
    ever when a rank other than 0 gets the signal, and once a step besides, which waits for the device.
    """

    AGREE_EVERY_S = 2.0
    """Seconds between agreements, each of which waits for the device; SLURM and torchrun kill after 30."""

    MOST_STEPS = 50
    """Steps between agreements, of steps however short: the next ones may take longer than the last."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._signum = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for signum in STOP_SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)
        self._agreed_at, self._agreed_step = time.perf_counter(), trainer.global_step
        self._next_step = trainer.global_step + 1
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):  # Lightning 2.6.6
            loop._broadcast_sigterm_tensor = lambda: None

    def on_train_end(self, *_: Any) -> None:
        self._restore_handlers()

    def on_exception(self, *_: Any) -> None:
        self._restore_handlers()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        signum = self._signum if trainer.world_size == 1 else self._agreed_signal(trainer)
        if signum and not validation_follows(trainer):  # or that step's held-out loss would be lost
            self.checkpoints.save(trainer)
            leave_together(trainer, 128 + signum, Stopped(signum))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum and signum == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self._signum = signum

    def _agreed_signal(self, trainer: pl.Trainer) -> int:
        """The signal that any rank got, told to all at the same step; and which step is the next to ask."""
        step, now = trainer.global_step, time.perf_counter()
        if step < self._next_step:
            return 0
        step_s = (now - self._agreed_at) / max(1, step - self._agreed_step)
        told = torch.tensor([float(self._signum), step_s], device=trainer.strategy.root_device)
        reduced = cast(torch.Tensor, trainer.strategy.reduce(told, reduce_op="max"))
        signum, slowest_step_s = reduced.tolist()
        self._agreed_at, self._agreed_step = now, step
        self._next_step = step + max(1, min(self.MOST_STEPS, int(self.AGREE_EVERY_S / slowest_step_s)))
        return int(signum)

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}


class StopWhenSkipping(Callback):
    """Stop a run that has skipped ``model.max_skipped_steps`` in a row.

    Looked at where ``Metrics`` waits for the device anyway, and at the last step. Guards of all ranks have
    seen the same losses and norms, so all ranks stop together.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step, module = trainer.global_step, cast(Pretraining, pl_module)
        if step % cast(Any, trainer).log_every_n_steps and step != trainer.max_steps:
            return
        skipped = module.stepper.guard.skipped_in_a_row
        if skipped >= module.max_skipped_steps:
            self.checkpoints.save(trainer)
            problem = (
                f"steps {step - skipped + 1} to {step} were all skipped: their losses or gradients spiked or "
                f"were not finite; the weights are those after step {step - skipped}, and "
                f"{what_continues(self.checkpoints.folder)}; try a lower --model.learning_rate, "
                "--trainer.precision 32-true or an older checkpoint (--resume PATH), and look at those data"
            )
            leave_together(trainer, USER_MISTAKE, TrainingError(problem))
