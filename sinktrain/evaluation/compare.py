"""Models side by side on one text: the measurements of ``sinktrain evaluate`` and ``compare``."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sinktrain import __version__
from sinktrain.data.sources import Source
from sinktrain.errors import ConfigError, ModelError, StreamError
from sinktrain.evaluation.perplexity import (
    Measured,
    Policy,
    Setting,
    cut_streams,
    dense_bytes,
    measure,
    settings_for,
)
from sinktrain.evaluation.statistics import by_position, mean_interval, paired_difference
from sinktrain.evaluation.texts import TokenizedText, tokenize_for
from sinktrain.model.checkpoints import ModelSource, describe, load_model
from sinktrain.model.config import ModelConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.layout import Layout, default_layouts

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """What to measure.

    Args:
        models: any forms of MODEL.
        text: what they are scored on; of shards, the held-out split.
        layouts: the paper's row when empty, N half of the shortest trained length.
        policies: ``streaming``, ``dense``.
        max_tokens: of the text, over all streams; all of it when None.
        num_streams: parallel streams that the text is cut into.
        device: torch device.
        dtype: of the weights and activations.
    """

    models: list[str]
    text: Source
    layouts: list[Layout]
    policies: tuple[Policy, ...]
    max_tokens: int | None
    num_streams: int
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Task:
    """A model and the streams that it is to be measured on."""

    source: ModelSource
    text: TokenizedText
    streams: NDArray[np.int64]


@dataclass(frozen=True)
class _Arm:
    """A measured model: its losses under each setting, in the table's order."""

    task: _Task
    facts: dict[str, Any]
    measured: list[Measured]

    @property
    def name(self) -> str:
        return self.task.source.name


def compare(request: Comparison) -> dict[str, Any]:
    """Measure every model under every setting, and the differences between them.

    Returns:
        The content of ``results.json``.

    Raises:
        SinktrainError: a model, text or layout that cannot be used as asked.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    sources = _distinct_names([describe(model) for model in request.models])
    configs = [load_model(source.source, "meta").config for source in sources]  # reads no weights
    layouts = list(dict.fromkeys(request.layouts)) or _shared_default_layouts(configs)
    tasks = [_task(*one, request, layouts) for one in zip(sources, configs, strict=True)]
    arms = [_measured_arm(task, request, layouts) for task in tasks]
    text_name = Path(request.text.location).expanduser().resolve().name
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": _environment(request, started_at),
        "models": [arm.facts for arm in arms],
        "perplexity": [_perplexity(arm, one, text_name) for arm in arms for one in arm.measured],
        "paired": [*_between_models(arms, text_name), *_between_layouts(arms, text_name)],
        "position_loss": [_position_loss(arm, one, text_name) for arm in arms for one in arm.measured],
        "latency": [],
        "sink_metric": [],
        "sink_attention": [],
        "norms": [],
        "removal": [],
        "streameval": [],
        "quantized": [],
    }


# -- measuring ------------------------------------------------------------------------------------


def _shared_default_layouts(configs: list[ModelConfig]) -> list[Layout]:
    return default_layouts(min(config.network.max_position_embeddings for config in configs))


def _task(source: ModelSource, config: ModelConfig, request: Comparison, layouts: list[Layout]) -> _Task:
    """Find what is wrong with a model, its tokenizer or the text before any model is measured."""
    for layout in layouts:
        layout.check_fits(config.network.max_position_embeddings)
    text = tokenize_for(config, source.source, request.text, request.max_tokens)
    return _Task(source, text, cut_streams(text.tokens, request.num_streams, _first_scored(layouts)))


def _first_scored(layouts: list[Layout]) -> int:
    return max(layout.num_slots for layout in layouts)


def _measured_arm(task: _Task, request: Comparison, layouts: list[Layout]) -> _Arm:
    model = load_model(task.source.source, request.device, request.dtype)
    stream_len = task.streams.shape[1] + len(model.sink_ids)
    settings = settings_for(request.policies, layouts, stream_len)
    settings = _affordable(settings, model, len(task.streams), stream_len, task.source.name)
    with progress_bar(total=len(settings), desc=task.source.name, unit="row") as bar:
        measured = []
        for one in measure(model, task.streams, settings, _first_scored(layouts)):
            if not np.isfinite(one.losses[:, 1:]).all():
                raise ModelError(
                    f"{task.source.source} gives losses that are not finite: its weights are damaged, its "
                    "training diverged, or the text holds its sink"
                )
            measured.append(one)
            bar.update()
    return _Arm(task, _facts(task.source, model), measured)


def _affordable(
    settings: list[Setting], model: GPTNeoX, num_streams: int, stream_len: int, name: str
) -> list[Setting]:
    """Leave out the dense row where its cache does not fit into the device's memory, and say so."""
    affordable = [setting for setting in settings if setting.policy != "dense"]
    needed, free = dense_bytes(model, num_streams, stream_len), _free_bytes(model.device)
    if needed < 0.5 * free or affordable == settings:
        return settings
    problem = (
        f"{num_streams} streams of {stream_len} tokens need {needed / 2**30:.1f} GiB "
        f"of {free / 2**30:.1f}; use a smaller --max-tokens to see it"
    )
    if not affordable:
        raise StreamError(f"{name}: dense does not fit: {problem}")
    print(f"{name}: dense left out: {problem}", file=sys.stderr)
    return affordable


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier rows held is free, but the driver does not know it
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        available = None
    return 1024 * int(available[1]) if available else sys.maxsize  # only Linux tells


# -- results --------------------------------------------------------------------------------------


def _facts(source: ModelSource, model: GPTNeoX) -> dict[str, Any]:
    return {
        "name": source.name,
        "source": source.source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sink": model.config.sink.to_dict(),
        "tokens_seen": source.tokens_seen,
        "seed": source.seed,
        "arm": source.arm,
    }


def _row(one: Measured, text_name: str) -> dict[str, Any]:
    setting = one.setting
    return {
        "text": text_name,
        "policy": setting.policy,
        "sinks": setting.layout.sinks,
        "window": setting.layout.window,
    }


def _perplexity(arm: _Arm, one: Measured, text_name: str) -> dict[str, Any]:
    interval = mean_interval(one.scored)
    is_scored = ~np.isnan(one.scored)
    tokens_scored = int(is_scored.sum())
    num_bytes = arm.task.text.num_bytes(arm.task.streams[is_scored])
    return {
        "model": arm.name,
        **_row(one, text_name),
        "tokens_scored": tokens_scored,
        "loss_nats": interval.mean,
        "perplexity": math.exp(interval.mean),
        "bits_per_byte": None if not num_bytes else interval.mean * tokens_scored / num_bytes / math.log(2),
        "ci95": [interval.low, interval.high],
    }


def _position_loss(arm: _Arm, one: Measured, text_name: str) -> dict[str, Any]:
    stream_pos = np.arange(one.losses.shape[1]) + one.first_pos
    positions, losses = by_position(one.losses, stream_pos)
    return {
        "model": arm.name,
        **_row(one, text_name),
        "stream_pos": positions.tolist(),
        "loss_nats": losses.tolist(),
    }


def _between_models(arms: list[_Arm], text_name: str) -> list[dict[str, Any]]:
    """Later models against earlier ones, under the same setting, where they share a vocabulary."""
    rows = []
    for first, second in itertools.combinations(arms, 2):
        if first.task.text.tokenizer.sha256 != second.task.text.tokenizer.sha256:
            continue
        for one, other in itertools.product(first.measured, second.measured):
            if _is_same_row(one.setting, other.setting):
                rows.append(_paired(second, other, first, one, text_name))
    return rows


def _between_layouts(arms: list[_Arm], text_name: str) -> list[dict[str, Any]]:
    """Each model's other rows against the one that keeps as many slots as it has sinks, or one."""
    rows = []
    for arm in arms:
        needed = max(1, arm.facts["sink"]["count"])
        streaming = [one for one in arm.measured if one.setting.policy == "streaming"]
        reference = next((one for one in streaming if one.setting.layout.sinks == needed), None)
        for one in streaming:
            if reference is not None and one is not reference:
                layouts = {
                    "a_sinks": one.setting.layout.sinks,
                    "a_window": one.setting.layout.window,
                    "b_sinks": reference.setting.layout.sinks,
                    "b_window": reference.setting.layout.window,
                }
                rows.append(_paired(arm, one, arm, reference, text_name) | layouts)
    return rows


def _paired(a: _Arm, a_measured: Measured, b: _Arm, b_measured: Measured, text_name: str) -> dict[str, Any]:
    difference = paired_difference(a_measured.scored, b_measured.scored)
    return {
        "a": a.name,
        "b": b.name,
        **_row(a_measured, text_name),
        "delta_nats": difference.delta_nats,
        "ci95": [difference.low, difference.high],
        "p": difference.p,
        "interval": "text",
    }


def _is_same_row(a: Setting, b: Setting) -> bool:
    """Dense rows belong together, though a stream with sinks is that much longer."""
    return a.policy == b.policy and (a.policy == "dense" or a.layout == b.layout)


def _distinct_names(sources: list[ModelSource]) -> list[ModelSource]:
    """Name models by their folders, with more of the path where two would be called alike."""
    places = [os.path.realpath(source.source) for source in sources]
    for number, source in enumerate(sources):
        if places[number] in places[:number]:
            raise ConfigError(f"{source.source} is named twice; name each model once")
    if len({source.name for source in sources}) == len(sources):
        return sources
    return [replace(source, name=source.source) for source in sources]


def _environment(request: Comparison, started_at: str) -> dict[str, Any]:
    device = torch.device(request.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "sinktrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "dtype": str(request.dtype).removeprefix("torch."),
        "max_tokens": request.max_tokens,
        "num_streams": request.num_streams,
        "started_at": started_at,
    }
