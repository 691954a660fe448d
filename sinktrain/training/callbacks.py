"""What happens around the training steps: checkpoints, clean stops, metrics, the progress bar."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from sinktrain.data.datamodule import WindowData
from sinktrain.errors import ConfigError
from sinktrain.progress import progress_bar
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.throughput import flops_per_token, peak_flops

LAST = "last.ckpt"


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save.

    Args:
        every_n_steps: optimizer steps between checkpoints; the last step is always saved.
        keep: newest checkpoints kept; all when null.
    """

    every_n_steps: int = 1000
    keep: int | None = 1

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or (self.keep is not None and self.keep < 1):
            raise ConfigError(
                f"checkpoint.every_n_steps {self.every_n_steps} and checkpoint.keep {self.keep} "
                "must be 1 or more"
            )


class Checkpoints(Callback):
    """Save every so many steps, at the end and before a stop; ``last.ckpt`` names the newest whole one.

    A checkpoint is written under a temporary name, flushed, renamed, and only then named ``last``.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it saved
                _discard(leftover)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.settings.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        name = f"step-{trainer.global_step:08d}.ckpt"
        temporary = self.folder / f".{name}.tmp"
        trainer.save_checkpoint(temporary)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            _flush(temporary)
            if (self.folder / name).is_dir():
                _discard(self.folder / name)
            os.replace(temporary, self.folder / name)
            self._name_last(name)
            self._discard_before(name)
        trainer.strategy.barrier()

    def _name_last(self, name: str) -> None:
        link = self.folder / f".{LAST}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self.folder / LAST)
        _flush(self.folder)

    def _discard_before(self, last: str) -> None:
        """Keep the newest up to ``last``; later ones stay, which a run left behind by going back."""
        if self.settings.keep is not None:
            names = sorted(path.name for path in self.folder.glob("step-*.ckpt"))
            for old in names[: names.index(last) + 1][: -self.settings.keep]:
                _discard(self.folder / old)


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


class Metrics(Callback):
    """Loss and speed, every ``trainer.log_every_n_steps``: the only place that waits for the device.

    Logs ``train/loss`` (nats, mean over the global batch), ``lr``, ``grad_norm``, ``tokens_seen``,
    ``tokens_per_s``, ``data_wait`` (share of the time), ``mfu`` and ``mfu_causal`` where the device's
    peak is known, and ``val/loss`` after each validation.
    """

    def __init__(self, table: MetricsTable) -> None:
        self.table = table
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.table.forget_after(trainer.global_step or -1)  # from the start: not even step 0 counts
        self._start_interval(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % cast(Any, trainer).log_every_n_steps == 0:
            module = cast(Pretraining, pl_module)
            self._log(trainer, self._training_metrics(trainer, module))
            self._start_interval(trainer)
        if step == trainer.max_steps:
            trainer.should_stop = True  # makes Lightning validate after the last step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.log_apart(trainer, {"val/loss": float(trainer.callback_metrics["val/loss"])})

    def log_apart(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """Log what was measured between two steps, and leave the time that it took out of the speed."""
        self._log(trainer, metrics)
        self._start_interval(trainer)

    def _training_metrics(self, trainer: pl.Trainer, module: Pretraining) -> dict[str, float]:
        assert module.train_loss is not None
        assert module.grad_norm is not None
        assert module.network is not None
        loss = trainer.strategy.reduce(module.train_loss, reduce_op="mean")  # waits for the device
        elapsed_s = time.perf_counter() - self._started_at
        data = _data(trainer)
        tokens = (trainer.global_step - self._first_step) * data.global_batch * data.seq_len
        metrics = {
            "train/loss": float(loss),
            "lr": module.schedule.learning_rate(trainer.global_step - 1),
            "grad_norm": float(module.grad_norm),
            "tokens_seen": float(data.samples_consumed * data.seq_len),
            "tokens_per_s": tokens / elapsed_s,
            "data_wait": (_wait_s(data) - self._wait_s) / elapsed_s,
        }
        peak = peak_flops(trainer.strategy.root_device)
        if peak is not None:
            config = module.network.config
            per_device = metrics["tokens_per_s"] / trainer.world_size
            for name, is_causal in (("mfu", False), ("mfu_causal", True)):
                flops = flops_per_token(config.network, config.vocab_size, data.seq_len, is_causal)
                metrics[name] = per_device * flops / peak
        return metrics

    def _start_interval(self, trainer: pl.Trainer) -> None:
        self._started_at = time.perf_counter()
        self._first_step = trainer.global_step
        self._wait_s = _wait_s(_data(trainer))

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        if trainer.is_global_zero:
            self.table.append(trainer.global_step, metrics)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


class ProgressBar(LightningProgressBar):
    """Steps done, time left, and the latest metrics, on one line of stderr."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics
        self._is_enabled = True
        self._bar: Any = None

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._is_enabled:
            self._bar = progress_bar(
                total=trainer.max_steps, initial=trainer.global_step, desc="fit", unit="step", smoothing=0.05
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _summary(self) -> str:
        formats: list[tuple[str, str, Callable[[float], str]]] = [
            ("train/loss", "loss", "{:.3f}".format),
            ("val/loss", "val", "{:.3f}".format),
            ("tokens_per_s", "tok/s", "{:,.0f}".format),
            ("mfu", "mfu", "{:.1%}".format),
        ]
        latest = self.metrics.latest
        return ", ".join(f"{label} {form(latest[key])}" for key, label, form in formats if key in latest)


def _data(trainer: pl.Trainer) -> WindowData:
    return cast(WindowData, cast(Any, trainer).datamodule)


def _wait_s(data: WindowData) -> float:
    return data.loader.wait_s if data.loader is not None else 0.0


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
