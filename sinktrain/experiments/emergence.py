"""Streaming measured while a model trains: when does it come to lean on its first token?

Axes: stream or text, token (sinks not counted).
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from tqdm import tqdm

from sinktrain.data.datamodule import WindowData
from sinktrain.data.shards import TokenSplit
from sinktrain.data.tokenizer import RESERVED_SINKS
from sinktrain.errors import ConfigError
from sinktrain.evaluation.perplexity import Setting, cut_streams, measure
from sinktrain.evaluation.pieces import cut_pieces
from sinktrain.evaluation.sink_metric import NUM_POSITIONS, sink_metric
from sinktrain.evaluation.telemetry import METRIC_EPS, METRIC_SEQ_LEN, METRIC_SEQUENCES
from sinktrain.model.checkpoints import empty_model
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.layout import Layout, default_layouts, parse_layouts
from sinktrain.training.metrics import Metrics
from sinktrain.training.module import Pretraining
from sinktrain.training.settings import StreamingSettings, TrainingCLI
from sinktrain.training.sharding import is_sharded

MAX_TOKENS = 8192
MAX_TIME_SHARE = 0.01


def streaming_gaps(cli: TrainingCLI, metrics: Metrics) -> list[Callback]:
    """What the settings under ``streaming.`` ask for; to be handed to ``sinktrain.training.fit.fit``.

    Raises:
        SinktrainError: layouts that the model or its held-out text is too short for.
    """
    settings: StreamingSettings = cli.config_init.streaming
    if not settings.every_n_steps:
        return []
    return [StreamingGaps(settings, cli.datamodule, cli.model.sink.count, metrics)]


class StreamingGaps(Callback):
    """Log how a model streams, and how much it looks at its first token, as it learns.

    Before the first step, every so many steps and after the last one, of the same held-out tokens:
    ``stream/loss_S+W`` (nats) under each layout, ``stream/gap`` and the sink metrics as
    ``measure_emergence`` gives them. ``stream/time_share`` is the share of all the time since training
    started in this process, validation included, that this has taken.

    Training goes on as if nothing had been. On CUDA, weights that train under bf16-mixed are measured as
    a bfloat16 copy, which takes its memory only meanwhile; otherwise the network itself is. Under DDP
    rank 0 measures, and the others wait for it where they next exchange gradients. A sharded strategy
    leaves no rank a whole network, so that nothing is measured.

    Args:
        num_sinks: of the model.
        metrics: where it is logged.
    """

    def __init__(
        self, settings: StreamingSettings, data: WindowData, num_sinks: int, metrics: Metrics
    ) -> None:
        assert settings.every_n_steps
        self.every_n_steps = settings.every_n_steps
        self.layouts = _layouts(settings.layouts, data.seq_len, num_sinks)
        self.tokens = _held_out(data, settings.max_tokens, max(layout.num_slots for layout in self.layouts))
        self.metrics = metrics
        self._is_off = False
        self._has_warned = False
        self._measured_step = -1
        self._measured_s = 0.0
        self._started_at = 0.0
        self._ended_at = 0.0  # of the newest measurement; a process's first one is slow, and warms up

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_off = not trainer.is_global_zero or is_sharded(trainer.strategy)
        if trainer.is_global_zero and self._is_off:
            _say(
                f"streaming is not measured under {type(trainer.strategy).__name__}, "
                "which leaves no device a whole network"
            )
        self._started_at = time.perf_counter()
        if trainer.global_step:
            self._measured_step = trainer.global_step  # before this checkpoint was written
        else:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_off or trainer.global_step == self._measured_step:
            return
        network = cast(Pretraining, pl_module).network
        assert network is not None
        if network.device.type == "cuda":
            torch.cuda.synchronize(network.device)  # the steps before are training's time
        began_at = time.perf_counter()
        measured = measure_emergence(_measurable(network, trainer), self.tokens, self.layouts)
        now = time.perf_counter()
        self._measured_s += now - began_at
        if trainer.global_step:
            measured["stream/time_share"] = self._measured_s / (now - self._started_at)
        self.metrics.log_apart(trainer, measured)
        if self._ended_at and trainer.global_step - self._measured_step == self.every_n_steps:
            self._warn_if_slow((now - began_at) / (now - self._ended_at))
        self._measured_step, self._ended_at = trainer.global_step, now

    def _warn_if_slow(self, share: float) -> None:
        if share <= MAX_TIME_SHARE or self._has_warned:
            return
        self._has_warned = True
        enough = math.ceil(self.every_n_steps * share / MAX_TIME_SHARE)
        _say(
            f"measuring the streaming takes {share:.1%} of the time; for {MAX_TIME_SHARE:.0%}, "
            f"--streaming.every_n_steps {enough} (0 measures nothing) or a smaller --streaming.max_tokens"
        )


@torch.no_grad()
def measure_emergence(model: GPTNeoX, tokens: NDArray[np.int64], layouts: list[Layout]) -> dict[str, float]:
    """How a model streams a text, and how much it looks at its first token.

    Args:
        tokens: int64[token], plain text, longer than the largest layout.
        layouts: S+W each.

    Returns:
        ``stream/loss_S+W``: mean loss in nats, of the same tokens under every layout.
        ``stream/gap``: loss under 0+N less that under S+(N-S), S the model's own sinks, 1 for a vanilla
        model; of the largest N that both are there for.
        ``sink/metric``: share of heads whose mean attention on position 0 exceeds 0.3.
        ``sink/metric_first``: the same on the first token of the text.
        ``sink/metric_null``: the same on the null slot, of a model that has one.
    """
    num_sinks = len(model.sink_ids)
    first_scored = max(layout.num_slots for layout in layouts)
    streams = cut_streams(tokens, len(tokens), first_scored)
    settings = [Setting("streaming", layout) for layout in layouts]
    losses = {row.setting.layout: row.scored for row in measure(model, streams, settings, first_scored)}
    found = {f"stream/loss_{layout}": float(np.nanmean(scored)) for layout, scored in losses.items()}
    kept = {layout.num_slots: layout for layout in losses if layout.sinks == max(1, num_sinks)}
    sizes = [layout.num_slots for layout in losses if layout.sinks == 0 and layout.num_slots in kept]
    if sizes:
        size = max(sizes)
        found["stream/gap"] = float(np.nanmean(losses[Layout(0, size)] - losses[kept[size]]))

    seq_len = min(METRIC_SEQ_LEN, model.config.network.max_position_embeddings, len(tokens))
    seq_len = max(seq_len, NUM_POSITIONS + num_sinks)
    pieces = cut_pieces(tokens[None], seq_len, METRIC_SEQUENCES)
    metric = sink_metric(model, pieces, seq_len, METRIC_EPS)
    found["sink/metric"] = float(metric.by_position[0])
    if num_sinks < NUM_POSITIONS:
        found["sink/metric_first"] = float(metric.by_position[num_sinks])
    if metric.null is not None:
        found["sink/metric_null"] = metric.null
    return found


def _layouts(named: str | None, seq_len: int, num_sinks: int) -> list[Layout]:
    if named is None:
        size = default_layouts(seq_len)[0].num_slots
        return [Layout(sinks, size - sinks) for sinks in sorted({0, 1, 4, num_sinks}) if sinks < size]
    layouts = parse_layouts(named)
    for layout in layouts:
        layout.check_fits(seq_len)
    return layouts


def _held_out(data: WindowData, max_tokens: int | None, num_slots: int) -> NDArray[np.int64]:
    """The first held-out tokens: int64[token]."""
    split = TokenSplit.open(data.path, "val")
    count = min(max_tokens or max(MAX_TOKENS, 4 * num_slots), split.num_tokens)
    needed = max(num_slots + 2, NUM_POSITIONS + RESERVED_SINKS)
    if count < needed:
        raise ConfigError(
            f"measuring the streaming needs {needed} held-out tokens or more, and there are {count}; use a "
            "larger --streaming.max_tokens, smaller --streaming.layouts, or --streaming.every_n_steps 0"
        )
    tokens: NDArray[np.int64] = split.read(np.zeros(1, np.int64), count)[0]
    return tokens


def _measurable(network: GPTNeoX, trainer: pl.Trainer) -> GPTNeoX:
    """The network, or where training casts its weights to bfloat16 at every use, a copy that is."""
    is_cast = network.device.type == "cuda" and trainer.precision == "bf16-mixed"
    return _bfloat16_copy(network) if is_cast else network


def _bfloat16_copy(network: GPTNeoX) -> GPTNeoX:
    copy = empty_model(network.config)
    weights = {name: weight.bfloat16() for name, weight in network.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.to(network.device)  # moves the rotary steps, which no state holds


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # beside the progress bar
