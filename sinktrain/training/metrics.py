"""What is measured while a model trains, and where it is told: table, loggers, progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from sinktrain.data.datamodule import WindowData
from sinktrain.progress import progress_bar
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.throughput import flops_per_token, peak_flops


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
        stepper, config = module.stepper, module.require_network.config
        assert stepper.loss is not None
        assert stepper.grad_norm is not None
        loss = float(stepper.loss)  # waits for the device
        elapsed_s = time.perf_counter() - self._started_at
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
