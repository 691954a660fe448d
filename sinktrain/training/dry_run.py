"""``sinktrain fit … --dry_run``: what a run is, needs and takes, from its settings and shards alone.

Bytes are decimal on disk (MB, GB) and binary in memory (MiB, GiB).
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch

from sinktrain.data.encoding import num_cpus
from sinktrain.data.windows import num_windows
from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import ModelConfig
from sinktrain.model.devices import HAS_TRITON
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.memory import (
    GIB,
    Memory,
    checkpoint_bytes,
    estimate_memory,
    num_parameters,
    sharded_stage,
)
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.settings import TrainingCLI
from sinktrain.training.starting import is_finished, start_text
from sinktrain.training.throughput import flops_per_token, peak_flops

ASSUMED_MFU = 0.40
"""In the causal convention; what litgpt reaches at 410m on an H100, and less than ours there."""

NEWEST_ROWS = 20
"""Rows of ``metrics.csv`` whose middle speed is that of the run."""


def plan(cli: TrainingCLI, trainer: pl.Trainer, checkpoint: Path | None) -> str:
    """A table of what the run would be, one subject a line.

    Args:
        trainer: made for training, with ``cli.model.trainer`` and ``cli.datamodule.trainer`` set to it.
        checkpoint: what the run would continue from; None for the start.
    """
    run = _Run.of(cli, trainer, checkpoint)
    rows = {
        "start": run.start_line(),
        "device": run.device_line(),
        "model": run.model_line(),
        "data": run.data_line(),
        "steps": run.steps_line(),
        "FLOPs": run.flops_line(),
        "memory": run.memory_line(),
        "checkpoints": run.checkpoints_line(),
        "validation": run.validation_line(),
        "time": run.time_line(),
    }
    if not run.fits():
        rows["will not fit"] = run.too_much_line()
    width = max(map(len, rows))
    lines = [f"{subject:<{width}}  {found}" for subject, found in rows.items()]
    return "\n".join([f"{cli.run.path}: a dry run; nothing is written, nothing is trained", *lines])


@dataclass(frozen=True)
class _Run:
    """The counts that the lines of the table share."""

    cli: TrainingCLI
    trainer: pl.Trainer
    config: ModelConfig
    model: GPTNeoX
    checkpoint: Path | None
    first_step: int

    @classmethod
    def of(cls, cli: TrainingCLI, trainer: pl.Trainer, checkpoint: Path | None) -> _Run:
        config = cli.model.model_config(cli.datamodule)
        first_step = 0
        if checkpoint is not None:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
            first_step = int(saved["global_step"])
        return cls(cli, trainer, config, empty_model(config), checkpoint, first_step)

    @property
    def device(self) -> torch.device:
        return self.trainer.strategy.root_device

    @property
    def memory_bytes(self) -> int:
        """Of each device; of the CPU the share of a process."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return host_bytes() // self.trainer.num_devices

    @property
    def is_muon(self) -> bool:
        return self.cli.model.optimizer_kind == "muon"

    @property
    def step_tokens(self) -> int:
        return self.cli.datamodule.global_batch * self.cli.datamodule.seq_len

    @property
    def max_steps(self) -> int:
        return self.trainer.max_steps

    @property
    def steps_left(self) -> int:
        return max(0, self.max_steps - self.first_step)

    def start_line(self) -> str:
        if is_finished(self.cli, self.checkpoint, self.max_steps):
            return f"finished already, at step {self.first_step:,}: raise --trainer.max_steps"
        return start_text(self.cli, self.checkpoint)

    def device_line(self) -> str:
        devices = self.trainer.world_size
        if self.device.type == "cuda":
            name = f"{torch.cuda.get_device_name(self.device)}, {in_memory(self.memory_bytes)}"
            return name if devices == 1 else f"{devices} x {name} each"
        cpu = f"CPU, {counted(num_cpus(), 'core')}, {in_memory(host_bytes())}"
        return cpu if devices == 1 else f"{cpu}, shared by {devices} processes"

    def model_line(self) -> str:
        total = num_parameters(self.model)
        inner = total - self.model.gpt_neox.embed_in.weight.numel() - self.model.embed_out.weight.numel()
        arm = self.cli.model.arm
        return f"{arm}, {millions(total)} parameters, {millions(inner)} without embedding and head"

    def data_line(self) -> str:
        data = self.cli.datamodule
        tokens = data.manifest.splits["train"].tokens
        windows = num_windows(tokens, data.seq_len)
        epochs = self.max_steps * data.global_batch / windows
        return f"{tokens:,} tokens in train, {windows:,} samples of {data.seq_len}; {epochs:,.2f} epochs"

    def steps_line(self) -> str:
        data, devices = self.cli.datamodule, self.trainer.world_size
        share = data.share(devices)
        micro_batches = share // data.rows_at_once
        split = f"devices {devices} x micro-batches {micro_batches} x {data.rows_at_once}"
        total = self.max_steps * self.step_tokens
        left = f", {self.steps_left:,} of them left" if self.first_step else ""
        return f"{self.max_steps:,} of {data.global_batch:,} samples ({split}){left}: {total:,} tokens"

    def flops_line(self) -> str:
        tokens = self.max_steps * self.step_tokens
        full, causal = (tokens * self._flops_per_token(is_causal) for is_causal in (False, True))
        return f"{full:.3g} with all of the attention matrix, {causal:.3g} with its causal half"

    def memory_line(self) -> str:
        found = self._memory()
        parts = ", ".join(f"{name} {in_memory(num_bytes)}" for name, num_bytes in vars(found).items())
        return (
            f"about {in_memory(found.total)} of the {in_memory(self.memory_bytes)} of a device "
            f"(estimate: {parts})"
        )

    def fits(self, rows: int | None = None, recomputes: bool | None = None) -> bool:
        """Whether a device holds the run; if asked, with other micro-batches, or activations recomputed."""
        return self._memory(rows, recomputes).total <= self.memory_bytes

    def too_much_line(self) -> str:
        needed, there = in_memory(self._memory().total), in_memory(self.memory_bytes)
        return f"a device needs about {needed} and has {there}; use {' or '.join(self._remedies())}"

    def _remedies(self) -> list[str]:
        """Options with which the run fits, or for which more devices are needed."""
        data, recompute = self.cli.datamodule, "--model.recompute_activations true"
        share = data.share(self.trainer.world_size)
        smaller = [rows for rows in range(data.rows_at_once - 1, 0, -1) if share % rows == 0]
        is_recomputed = self.cli.model.recompute_activations
        found = [f"--data.micro_batch {rows}" for rows in smaller if self.fits(rows)][:1]
        if not is_recomputed and self.fits(recomputes=True):
            found.append(recompute)
        if not found and not is_recomputed:
            both = [rows for rows in smaller if self.fits(rows, recomputes=True)]
            found += [f"--data.micro_batch {rows} {recompute}" for rows in both[:1]]
        if self.device.type == "cuda" and not sharded_stage(self.trainer.strategy):
            found.append("--config fsdp on several GPUs")
        return found or ["a smaller model, or more devices"]

    def _memory(self, rows: int | None = None, recomputes: bool | None = None) -> Memory:
        model, data = self.cli.model, self.cli.datamodule
        return estimate_memory(
            self.config,
            data.rows_at_once if rows is None else rows,
            data.seq_len,
            is_mixed=self.trainer.precision == "bf16-mixed",
            is_fused=self.device.type == "cuda" and HAS_TRITON,
            recomputes=model.recompute_activations if recomputes is None else recomputes,
            is_muon=self.is_muon,
            strategy=self.trainer.strategy,
            world_size=self.trainer.world_size,
        )

    def checkpoints_line(self) -> str:
        settings = self.cli.config_init.checkpoint
        each = checkpoint_bytes(self.model, self.is_muon)
        at_once = settings.most_at_once(self.max_steps)
        begins = settings.log_spaced and self.first_step == 0  # before the first step as well
        next_step = 0 if begins else self.first_step + 1
        saved = [step for step in range(next_step, self.max_steps) if settings.is_due(step)]
        there = sum(path.stat().st_size for path in self.cli.run.checkpoints.glob("step-*.ckpt"))
        free = shutil.disk_usage(next(path for path in self._places() if path.exists())).free
        short = "" if free + there >= at_once * each else ": TOO LITTLE, use a smaller --checkpoint.keep"
        return (
            f"{steps_text([*saved, *self._last_step()])}; {on_disk(each)} each, "
            f"{counted(at_once, 'checkpoint')} at once: {on_disk(at_once * each)}, "
            f"and {on_disk(free)} are free{short}"
        )

    def validation_line(self) -> str:
        every = int(self.trainer.val_check_interval)
        steps = range(every * (self.first_step // every + 1), self.max_steps, every)
        num_samples = self.cli.datamodule.val_dataloader().num_samples
        return f"{steps_text([*steps, *self._last_step()])}; {counted(num_samples, 'sample')}"

    def _last_step(self) -> list[int]:
        """The last step, where it is still to come."""
        return [self.max_steps] if self.steps_left else []

    def time_line(self) -> str:
        if not self.steps_left:
            return "none"
        left = self.steps_left * self.step_tokens
        for tokens_per_s, source in self._speeds():
            return f"{hours(left / tokens_per_s)}, training alone, at {tokens_per_s:,.0f} tokens/s: {source}"
        return "unknown: the peak of this device is not; after some steps the run's metrics.csv tells"

    def _speeds(self) -> Iterator[tuple[float, str]]:
        """Tokens per second, and where that is from; the best source first."""
        rows = MetricsTable(self.cli.run.path / "metrics.csv").rows()
        measured = [float(row["tokens_per_s"]) for row in rows if row.get("tokens_per_s")]
        if measured:
            yield statistics.median(measured[-NEWEST_ROWS:]), "as this run was measured before"
        peak = peak_flops(self.device)
        if peak is not None:
            speed = ASSUMED_MFU * peak * self.trainer.world_size / self._flops_per_token(is_causal=True)
            yield speed, f"assumes an MFU of {ASSUMED_MFU:.2f} (causal) of {peak / 1e12:.0f} TFLOP/s a device"

    def _flops_per_token(self, is_causal: bool) -> float:
        seq_len = self.cli.datamodule.seq_len
        return flops_per_token(self.config.network, self.config.vocab_size, seq_len, is_causal)

    def _places(self) -> list[Path]:
        """The run folder, and those that it would be made in."""
        path = self.cli.run.path.absolute()
        return [path, *path.parents]


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def counted(count: int, thing: str) -> str:
    """``1 sample``, ``2,000 samples``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def steps_text(steps: list[int]) -> str:
    """``143 times, after steps 1,000, 2,000, 3,000, … 143,000``."""
    if not steps:
        return "none"
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 5:
        shown = [*shown[:3], f"… {shown[-1]}"]
    after = "after step" if len(steps) == 1 else "after steps"
    return f"{counted(len(steps), 'time')}, {after} {', '.join(shown)}"


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f}m"


def in_memory(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def on_disk(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.2g} minutes"
