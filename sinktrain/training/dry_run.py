"""``sinktrain fit … --dry_run``: what a run is, needs and takes, from its settings and shards alone.

Bytes are decimal on disk (MB, GB) and binary in memory (MiB, GiB).
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from sinktrain.data.windows import num_windows
from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import ModelConfig
from sinktrain.model.devices import HAS_TRITON
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import arm_name
from sinktrain.training.muon import muon_groups
from sinktrain.training.settings import TrainingCLI
from sinktrain.training.throughput import flops_per_token, peak_flops

GIB = 2**30
ASSUMED_MFU = 0.40
"""In the causal convention; what litgpt reaches at 410m on an H100, and less than ours there."""

NEWEST_ROWS = 20
"""Rows of ``metrics.csv`` whose middle speed is that of the run."""

KEPT_WIDTHS, FUSED_KEPT_WIDTHS = 9, 7
"""Activations of a layer that its backward pass reads, each ``hidden_size`` wide: the residual stream,
two normalised copies, query, key and value, rotated query and key (in place where attention is fused with
its projection), what attention mixed."""

KEPT_MLP_WIDTHS, FUSED_KEPT_MLP_WIDTHS = 2, 1
"""The same, each ``intermediate_size`` wide: before and, where it is not computed again, after the
activation function."""

FUSED_LOGITS_BYTES = GIB
"""Most logits that the fused loss holds (``sinktrain.model.fused.LOGITS_BYTES``; that needs Triton)."""

WEIGHT_BYTES, GRADIENT_BYTES = 4, 4
MOMENT_BYTES = 4
"""Float32: AdamW keeps two moments of a parameter, Muon one."""


def plan(cli: TrainingCLI, trainer: pl.Trainer, checkpoint: Path | None) -> str:
    """A table of what the run would be, one subject a line.

    Args:
        trainer: made for training, with ``cli.model.trainer`` and ``cli.datamodule.trainer`` set to it.
        checkpoint: what the run would continue from; None for the start.
    """
    run = _Run.of(cli, trainer, checkpoint)
    rows = {
        "start": "from the start" if checkpoint is None else f"from {checkpoint.resolve().name}",
        "model": run.model_line(),
        "data": run.data_line(),
        "steps": run.steps_line(),
        "FLOPs": run.flops_line(),
        "memory": run.memory_line(),
        "checkpoints": run.checkpoints_line(),
        "validation": run.validation_line(),
        "time": run.time_line(),
    }
    width = max(map(len, rows))
    lines = [f"{subject:<{width}}  {found}" for subject, found in rows.items()]
    return "\n".join([f"{cli.run.path}: a dry run; nothing is written, nothing is trained", *lines])


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of a device while it trains."""

    state: float
    """Weights, gradients and the optimizer's moments, or the device's shard of them."""
    casts: float
    """Weights in the precision of the matrix products, or gathered from the other devices."""
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.state + self.casts + self.activations + self.logits


def estimate_memory(
    config: ModelConfig,
    rows: int,
    seq_len: int,
    *,
    is_mixed: bool = False,
    is_fused: bool = False,
    recomputes: bool = False,
    is_muon: bool = False,
    strategy: Strategy | None = None,
    world_size: int = 1,
) -> Memory:
    """What a device holds at the end of a micro-batch's forward pass, when it holds the most.

    State is 16 bytes a parameter (12 to 16 under Muon), of which strategies that shard leave each device
    its part. Activations are those that autograd keeps, ``KEPT_WIDTHS`` and ``KEPT_MLP_WIDTHS``, and the
    float32 log-sum-exp of each head; with ``recomputes`` the residual stream of every layer and all of one
    layer. The same formula gives 16.1 GiB for 160m at micro-batch 32 on an H100, where 16.6 were measured.

    Args:
        config: model, sink included.
        rows: samples of a micro-batch.
        is_mixed: matrix products in bf16; otherwise everything is float32.
        is_fused: layers and loss as CUDA has them; otherwise all logits, their float32 log-softmax and
            its gradient are held.
        strategy: of the run; None for one device.
    """
    network, empty = config.network, empty_model(config)
    element = 2 if is_mixed else 4
    parameters = num_parameters(empty)
    stage = _sharded_stage(strategy)
    own = [1 / world_size if stage >= needed else 1.0 for needed in (3, 2, 1)]
    state = (
        WEIGHT_BYTES * parameters * own[0]
        + GRADIENT_BYTES * parameters * (own[1] + _copies_gradients(strategy))
        + _moments_bytes(empty, is_muon) * own[2]
    )
    assert network.intermediate_size is not None
    tokens = rows * seq_len
    residual = tokens * network.hidden_size * element
    widths, mlp_widths = KEPT_WIDTHS, KEPT_MLP_WIDTHS
    if is_fused:
        widths, mlp_widths = FUSED_KEPT_WIDTHS, FUSED_KEPT_MLP_WIDTHS
    kept = widths * network.hidden_size + mlp_widths * network.intermediate_size
    layer = tokens * (kept * element + 4 * network.num_attention_heads)
    layers = network.num_hidden_layers
    all_logits = tokens * config.vocab_size
    return Memory(
        state=state,
        casts=parameters * element if is_mixed or stage == 3 else 0,
        activations=layers * residual + layer if recomputes else layers * layer,
        logits=min(all_logits * element, FUSED_LOGITS_BYTES) if is_fused else all_logits * (element % 4 + 8),
    )


def num_parameters(model: GPTNeoX) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _moments_bytes(model: GPTNeoX, is_muon: bool) -> int:
    if not is_muon:
        return 2 * MOMENT_BYTES * num_parameters(model)
    return sum(
        (1 if "momentum" in group else 2) * MOMENT_BYTES * parameter.numel()
        for group in muon_groups(model, weight_decay=0.0)
        for parameter in group["params"]
    )


def _sharded_stage(strategy: Strategy | None) -> int:
    """What is in shards, as ZeRO counts: 1 the optimizer, 2 gradients too, 3 weights too; 0 nothing."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        return 3
    if isinstance(strategy, DeepSpeedStrategy):
        config: dict[str, Any] = strategy.config or {}
        return int(config.get("zero_optimization", {}).get("stage", 0))
    return 0


def _copies_gradients(strategy: Strategy | None) -> bool:
    """Whether DDP's buckets hold the gradients a second time."""
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return False
    return not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)


@dataclass(frozen=True)
class _Run:
    """The counts that the lines of the table share."""

    cli: TrainingCLI
    trainer: pl.Trainer
    config: ModelConfig
    model: GPTNeoX
    first_step: int

    @classmethod
    def of(cls, cli: TrainingCLI, trainer: pl.Trainer, checkpoint: Path | None) -> _Run:
        config = cli.model.model_config(cli.datamodule)
        first_step = 0
        if checkpoint is not None:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
            first_step = int(saved["global_step"])
        return cls(cli, trainer, config, empty_model(config), first_step)

    @property
    def device(self) -> torch.device:
        return self.trainer.strategy.root_device

    @property
    def step_tokens(self) -> int:
        return self.cli.datamodule.global_batch * self.cli.datamodule.seq_len

    @property
    def max_steps(self) -> int:
        return self.trainer.max_steps

    def model_line(self) -> str:
        total = num_parameters(self.model)
        inner = total - self.model.gpt_neox.embed_in.weight.numel() - self.model.embed_out.weight.numel()
        sink = arm_name(self.config.sink)
        return f"{sink}, {millions(total)} parameters, {millions(inner)} without embedding and head"

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
        left = f", {self.max_steps - self.first_step:,} of them left" if self.first_step else ""
        return f"{self.max_steps:,} of {data.global_batch:,} samples ({split}){left}: {total:,} tokens"

    def flops_line(self) -> str:
        tokens = self.max_steps * self.step_tokens
        full, causal = (tokens * self._flops_per_token(is_causal) for is_causal in (False, True))
        return f"{full:.3g} with all of the attention matrix, {causal:.3g} with its causal half"

    def memory_line(self) -> str:
        model, data = self.cli.model, self.cli.datamodule
        found = estimate_memory(
            self.config,
            data.rows_at_once,
            data.seq_len,
            is_mixed=self.trainer.precision == "bf16-mixed",
            is_fused=self.device.type == "cuda" and HAS_TRITON,
            recomputes=model.recompute_activations,
            is_muon=model.optimizer_kind == "muon",
            strategy=self.trainer.strategy,
            world_size=self.trainer.world_size,
        )
        parts = ", ".join(f"{name} {in_memory(num_bytes)}" for name, num_bytes in vars(found).items())
        return f"about {in_memory(found.total)} a device (estimate: {parts}){self._fits(found.total)}"

    def checkpoints_line(self) -> str:
        settings = self.cli.config_init.checkpoint
        each = WEIGHT_BYTES * num_parameters(self.model) + _moments_bytes(
            self.model, self.cli.model.optimizer_kind == "muon"
        )
        at_once = settings.most_at_once(self.max_steps)
        begins = settings.log_spaced and self.first_step == 0  # before the first step as well
        next_step = 0 if begins else self.first_step + 1
        saved = [step for step in range(next_step, self.max_steps) if settings.is_due(step)]
        there = sum(path.stat().st_size for path in self.cli.run.checkpoints.glob("step-*.ckpt"))
        free = shutil.disk_usage(next(path for path in self._places() if path.exists())).free
        short = "" if free + there >= at_once * each else ": TOO LITTLE, use a smaller --checkpoint.keep"
        return (
            f"{steps_text([*saved, self.max_steps])}; {on_disk(each)} each, {at_once:,} at once take "
            f"{on_disk(at_once * each)}, and {on_disk(free)} are free{short}"
        )

    def validation_line(self) -> str:
        every = int(self.trainer.val_check_interval)
        steps = [*range(every, self.max_steps, every), self.max_steps]
        num_samples = self.cli.datamodule.val_dataloader().num_samples
        return f"{steps_text([step for step in steps if step > self.first_step])}; {num_samples:,} samples"

    def time_line(self) -> str:
        left = (self.max_steps - self.first_step) * self.step_tokens
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

    def _fits(self, num_bytes: float) -> str:
        if self.device.type != "cuda":
            return ""
        available = torch.cuda.get_device_properties(self.device).total_memory
        remedy = "" if num_bytes <= available else ": TOO LITTLE, use a smaller --data.micro_batch"
        return f", of {in_memory(available)}{remedy}"

    def _places(self) -> list[Path]:
        """The run folder, and those that it would be made in."""
        path = self.cli.run.path.absolute()
        return [path, *path.parents]


def steps_text(steps: list[int]) -> str:
    """``143 times: 1,000, 2,000, 3,000, … 143,000``."""
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 5:
        shown = [*shown[:3], f"… {shown[-1]}"]
    return f"{len(steps):,} times, after steps {', '.join(shown)}"


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f}m"


def in_memory(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def on_disk(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.2g} minutes"
