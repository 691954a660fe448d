"""Models side by side on the same texts: the measurements of ``sinktrain evaluate`` and ``compare``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sinktrain import __version__
from sinktrain.data.sources import Source
from sinktrain.errors import ConfigError, ModelError, SinktrainError, first_line
from sinktrain.evaluation.arms import TASKS, Arm, Plan, Streams, measure_arm
from sinktrain.evaluation.harness_pairs import paired_rows
from sinktrain.evaluation.harness_tasks import ZERO_SHOT, load_tasks
from sinktrain.evaluation.perplexity import RECOMPUTE_TOKENS, cut_streams
from sinktrain.evaluation.rows import (
    between_layouts,
    between_models,
    between_policies,
    perplexity_rows,
    position_rows,
)
from sinktrain.evaluation.seeds import arm_rows, seed_rows
from sinktrain.evaluation.texts import tokenize_for
from sinktrain.model.checkpoints import ModelSource, describe, load_model
from sinktrain.model.config import ModelConfig
from sinktrain.model.devices import dtype_name
from sinktrain.streaming.layout import Layout, default_layouts

__all__ = ["TASKS", "ZERO_SHOT", "Comparison", "compare"]

SCHEMA_VERSION = 1
LISTS = (
    "training",
    "latency",
    "sink_metric",
    "sink_attention",
    "norms",
    "removal",
    "streameval",
    "quantized",
    "zero_shot",
    "verified",
)


@dataclass(frozen=True)
class Comparison:
    """What to measure.

    Args:
        models: any forms of MODEL.
        texts: what they are scored on; of shards, the held-out split.
        layouts: the paper's row when empty, N half of the shortest trained length.
        policies: of ``streaming``, ``dense``, ``recompute``.
        tasks: of ``TASKS``.
        max_tokens: of each text, over all streams; all of it when None.
        num_streams: parallel streams that a text is cut into.
        recompute_tokens: of each text, that ``recompute`` scores.
        verify_tokens: that the decoder is stepped over, to check the blockwise evaluation; 0 for none.
        device: torch device.
        dtype: of the weights and activations.
        out: where the report will be; measurements are kept below it, so that the same command goes on.
        command: that repeats the comparison, for the report.
        schemes: of ``quantizers.SCHEMES``, whose cost in loss is measured.
        harness: tasks of lm-evaluation-harness.
        task_folder: of definitions of such tasks.
        task_limit: examples of each of them; all when None.
    """

    models: list[str]
    texts: list[Source]
    layouts: list[Layout]
    policies: tuple[str, ...]
    tasks: tuple[str, ...]
    max_tokens: int | None
    num_streams: int
    device: str
    dtype: torch.dtype
    out: Path
    recompute_tokens: int = RECOMPUTE_TOKENS
    verify_tokens: int = 0
    command: str = ""
    schemes: tuple[str, ...] = ()
    harness: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None


def compare(request: Comparison) -> dict[str, Any]:
    """Measure every model under every setting, and the differences between them.

    A model that cannot be measured to the end is named in ``failed``, and so is a task that cannot be asked;
    the others' results stand.

    Returns:
        The content of ``results.json``.

    Raises:
        SinktrainError: a model, text or layout that cannot be used as asked, found before anything is
            measured; or no model could be measured.
    """
    started_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    sources = _distinct_names([describe(model) for model in request.models])
    configs = [load_model(source.source, "meta").config for source in sources]  # reads no weights
    plan = _plan(request, configs)
    texts = [_streams(*one, request, plan) for one in zip(sources, configs, strict=True)]
    plan = replace(plan, harness=load_tasks(request.harness, request.task_folder, request.task_limit))
    arms, failed = _measured(list(zip(sources, texts, strict=True)), plan)
    models, perplexity = [arm.facts for arm in arms], _all(perplexity_rows, arms)
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": _environment(request, started_at)
        | {"texts": [text.name for text in texts[0]], "elapsed_s": time.monotonic() - began},
        "models": models,
        "perplexity": perplexity,
        "paired": [
            *between_models(arms),
            *_all(between_layouts, arms),
            *_all(between_policies, arms),
            *seed_rows(models, perplexity),
        ],
        "arms": arm_rows(models, perplexity),
        "position_loss": _all(position_rows, arms),
        **{name: _rows_of(name, arms) for name in LISTS},
        "zero_shot_paired": paired_rows(_rows_of("example_scores", arms)),
        "failed": [
            *failed,
            *_rows_of("failed", arms),
            *(row for arm in arms for row in plan.harness.failures(arm.name)),
        ],
    }


def _plan(request: Comparison, configs: list[ModelConfig]) -> Plan:
    lengths = [config.network.max_position_embeddings for config in configs]
    layouts = list(dict.fromkeys(request.layouts)) or default_layouts(min(lengths))
    for layout in layouts:
        layout.check_fits(min(lengths))
    return Plan(
        layouts,
        request.policies,
        request.tasks,
        request.recompute_tokens,
        request.verify_tokens,
        request.device,
        request.dtype,
        request.out,
        request.schemes,
    )


def _streams(source: ModelSource, config: ModelConfig, request: Comparison, plan: Plan) -> list[Streams]:
    """The texts for a model; finds what is wrong with its tokenizer or a text before any is measured."""
    streams = []
    for name, text in zip(_text_names(request.texts), request.texts, strict=True):
        tokenized = tokenize_for(config, source.source, text, request.max_tokens)
        cut = cut_streams(tokenized.tokens, request.num_streams, plan.first_scored)
        streams.append(Streams(name, tokenized, cut))
    return streams


def _measured(
    tasks: Sequence[tuple[ModelSource, list[Streams]]], plan: Plan
) -> tuple[list[Arm], list[dict[str, str]]]:
    arms: list[Arm] = []
    errors: dict[str, SinktrainError | OSError] = {}
    for source, texts in tasks:
        try:
            arms.append(measure_arm(source, texts, plan))
        except (SinktrainError, OSError) as error:
            errors[source.name] = error
        except torch.OutOfMemoryError as error:
            errors[source.name] = ModelError(
                f"{source.source} does not fit into the memory of {plan.device}: {first_line(error)}; "
                "use fewer --streams, smaller --layouts or another --device"
            )
    if not arms:
        raise next(iter(errors.values()))
    return arms, [{"model": name, "error": str(error)} for name, error in errors.items()]


def _all(rows: Any, arms: list[Arm]) -> list[dict[str, Any]]:
    return [row for arm in arms for row in rows(arm)]


def _rows_of(name: str, arms: list[Arm]) -> list[dict[str, Any]]:
    return [row for arm in arms for row in arm.rows.get(name, [])]


def _text_names(texts: list[Source]) -> list[str]:
    """Texts by their files' names, with the whole path where two would be called alike."""
    paths = [Path(text.location).expanduser().resolve() for text in texts]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ConfigError(f"{texts[number].location} is given twice; give each --text once")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(text.location) for text in texts]


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
        "dtype": dtype_name(request.dtype),
        "max_tokens": request.max_tokens,
        "num_streams": request.num_streams,
        "started_at": started_at,
        "command": request.command,
    }
