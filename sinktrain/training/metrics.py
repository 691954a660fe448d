"""What is measured while a model trains, and where it is told: table, loggers, progress bar or lines."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from sinktrain.data.datamodule import WindowData
from sinktrain.progress import progress_bar
from sinktrain.training.loggers import forget_after
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.throughput import flops_per_token, peak_flops


class Metrics(Callback):
    """Loss and speed, every ``trainer.log_every_n_steps``: the only place that waits for the device.

    Logs ``train/loss`` (nats, mean over the global batch), ``lr``, ``grad_norm``, ``tokens_seen``,
    ``tokens_per_s``, ``data_wait`` (share of the time), ``mfu`` and ``mfu_causal`` where the device's
    peak is known, ``memory_bytes`` (on CUDA: the most that was allocated on this rank's device since the
    time before), ``eta_s`` (time left; validation and checkpoints count), and ``val/loss`` after each
    validation.
    """

    RATE_OVER_N_LOGS = 20
    """The time left comes from the rate over so many."""

    def __init__(self, table: MetricsTable) -> None:
        self.table = table
        self.latest: dict[str, float] = {}
        self._logged_at: deque[tuple[int, float]] = deque(maxlen=self.RATE_OVER_N_LOGS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            step = trainer.global_step or -1  # from the start: not even step 0 counts
            self.table.forget_after(step)
            for logger in trainer.loggers:
                forget_after(logger, step)
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
        stepper, config = module.stepper, module.require_network.config
        assert stepper.loss is not None
        assert stepper.grad_norm is not None
        loss = float(stepper.loss)  # waits for the device
        now = time.perf_counter()
        elapsed_s = now - self._started_at
        data = _data(trainer)
        tokens = (trainer.global_step - self._first_step) * data.global_batch * data.seq_len
        metrics = {
            "train/loss": loss,
            "lr": module.schedule.learning_rate(trainer.global_step - 1),
            "grad_norm": float(stepper.grad_norm),
            "tokens_seen": float(data.samples_consumed * data.seq_len),
            "skipped_steps": float(stepper.guard.skipped),
            "tokens_per_s": tokens / elapsed_s,
            "data_wait": (_wait_s(data) - self._wait_s) / elapsed_s,
        }
        peak = peak_flops(trainer.strategy.root_device)
        if peak is not None:
            per_device = metrics["tokens_per_s"] / trainer.world_size
            for name, is_causal in (("mfu", False), ("mfu_causal", True)):
                flops = flops_per_token(config.network, config.vocab_size, data.seq_len, is_causal)
                metrics[name] = per_device * flops / peak
        return metrics | _peak_memory(trainer.strategy.root_device) | self._time_left(trainer, now)

    def _time_left(self, trainer: pl.Trainer, now: float) -> dict[str, float]:
        """Nothing the first time: a process's first steps are slow, as they compile."""
        self._logged_at.append((trainer.global_step, now))
        first_step, first_at = self._logged_at[0]
        if trainer.global_step == first_step:
            return {}
        step_s = (now - first_at) / (trainer.global_step - first_step)
        return {"eta_s": step_s * (trainer.max_steps - trainer.global_step)}

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
    """Steps done, time left, and the latest metrics on stderr: a live line, or plain ones for a log.

    Args:
        is_live: draw a bar; otherwise print a line now and then.
    """

    LINE_INTERVAL_S = 30.0

    def __init__(self, metrics: Metrics, is_live: bool) -> None:
        super().__init__()
        self.metrics = metrics
        self.is_live = is_live
        self._is_enabled = True
        self._bar: Any = None
        self._line_at = -self.LINE_INTERVAL_S

    def disable(self) -> None:
        """Lightning's word to all ranks but 0."""
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._is_enabled and self.is_live:
            self._bar = progress_bar(
                total=trainer.max_steps, initial=trainer.global_step, smoothing=0.05, bar_format=_BAR
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._bar is not None:
            head = len(_HEAD.format(n=trainer.global_step, total=trainer.max_steps))
            self._bar.set_postfix_str(_summary(self.metrics.latest, self._bar.ncols - head), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
        elif self._is_enabled and trainer.global_step % cast(Any, trainer).log_every_n_steps == 0:
            self._print_line(trainer)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print_line(self, trainer: pl.Trainer) -> None:
        if time.perf_counter() - self._line_at < self.LINE_INTERVAL_S:
            return
        self._line_at = time.perf_counter()
        latest = self.metrics.latest
        left = f", {timedelta(seconds=round(latest['eta_s']))} left" if "eta_s" in latest else ""
        line = f"step {trainer.global_step}/{trainer.max_steps}: {_summary(latest)}{left}"
        print(line, file=sys.stderr, flush=True)


_BAR = "fit {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
_HEAD = "fit 100%|█| {n}/{total}, 0:00:00 left, "
"""The least that stands before the metrics."""


def _summary(latest: dict[str, float], columns: float = math.inf) -> str:
    """Such as ``loss 2.913, val 2.950, 551,234 tok/s, mfu 47.5%, 31.2 GiB, 2 skipped``; what fits of it."""
    parts = [
        form.format(latest[name])
        for name, form in {
            "train/loss": "loss {:.3f}",
            "val/loss": "val {:.3f}",
            "tokens_per_s": "{:,.0f} tok/s",
            "mfu": "mfu {:.1%}",
        }.items()
        if name in latest
    ]
    if "memory_bytes" in latest:
        parts.append(f"{latest['memory_bytes'] / 2**30:.1f} GiB")
    if latest.get("skipped_steps"):
        parts.append(f"{latest['skipped_steps']:.0f} skipped")
    while parts and len(", ".join(parts)) > columns:
        parts.pop()
    return ", ".join(parts)


def _peak_memory(device: torch.device) -> dict[str, float]:
    """The most allocated on a CUDA device since the last call."""
    if device.type != "cuda":
        return {}
    peak_bytes = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory_bytes": float(peak_bytes)}


def _data(trainer: pl.Trainer) -> WindowData:
    return cast(WindowData, cast(Any, trainer).datamodule)


def _wait_s(data: WindowData) -> float:
    return data.loader.wait_s if data.loader is not None else 0.0
