"""Tasks of lm-evaluation-harness for the models of a comparison, and their scores."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sinktrain.data.tokenizer import Tokenizer
from sinktrain.errors import ConfigError, did_you_mean, first_line
from sinktrain.evaluation.store import Store
from sinktrain.model.neox import GPTNeoX

ZERO_SHOT = (
    "arc_challenge",
    "arc_easy",
    "hellaswag",
    "lambada_openai",
    "openbookqa",
    "piqa",
    "winogrande",
)
"""The seven of the paper's table 4, by lm-eval's names."""

FOLDERS = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "winogrande")
"""Of lm-eval, where they are defined: looking through all of its 14,000 tasks takes ten seconds."""

Row = dict[str, Any]


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their data.

    Args:
        loaded: what lm-eval's ``TaskManager.load`` gives, by the name asked for.
        limit: examples of each task; all when None.
        failed: why a task could not be loaded, by its name.
    """

    loaded: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def failures(self, model: str) -> list[Row]:
        """Rows of ``failed[]`` for the tasks that no model can be asked."""
        return [{"model": model, "task": name, "error": error} for name, error in self.failed.items()]


def load_tasks(names: Sequence[str], folder: Path | None, limit: int | None) -> HarnessTasks:
    """Find tasks and read their data; one whose data cannot be had is told, and the others go on.

    Args:
        names: of lm-eval, or of definitions in the folder: tasks, groups or tags.
        folder: of task definitions of one's own (YAML).
        limit: examples of each.

    Raises:
        ConfigError: lm-eval is not installed, there is no such folder, or no task of such a name.
    """
    if not names:
        return HarnessTasks()
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"--tasks {names[0]} needs lm-evaluation-harness; pip install 'sinktrain[lm-eval]' "
            "or leave it out"
        )
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--task-folder {folder} is no folder; give one that holds task definitions (YAML)")
    tasks = HarnessTasks(limit=limit)
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        manager = _manager(names, folder)
        for name in names:
            try:
                tasks.loaded[name] = _zero_shot_unless_told(manager.load([name]))
            except Exception as error:  # the definitions and the data are others', and fail in every way
                tasks.failed[name] = _refusal(name, error)
                if isinstance(error, ConnectionError):
                    stack.enter_context(_offline())
    return tasks


def _refusal(name: str, error: Exception) -> str:
    if isinstance(error, OSError):
        return (
            f"{name}: its data cannot be had: {first_line(error)}; run it once with a network, after which "
            "the data is kept, or leave it out of --tasks"
        )
    return f"{name}: its definition cannot be used: {first_line(error)}; mend it, or leave it out of --tasks"


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    import lm_eval.tasks

    own = [folder] if folder else []
    shipped = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(
        include_path=[*(shipped / name for name in FOLDERS), *own], include_defaults=False
    )
    if all(name in manager.task_index for name in names):
        return manager
    manager = lm_eval.tasks.TaskManager(include_path=own)
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(
                f'--tasks "lm-eval:{name}" is no task of lm-evaluation-harness'
                f"{did_you_mean(name, manager.all_tasks)}; one of your own needs --task-folder DIR"
            )
    return manager


def _zero_shot_unless_told(loaded: Any) -> Any:
    """What ``lm_eval.simple_evaluate`` does with tasks before it asks them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Once the Hub could not be reached, what is kept here has to do: each question takes half a minute."""
    import datasets.config
    import huggingface_hub.constants

    places: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, was_offline in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was_offline


def harness_rows(
    model: GPTNeoX, name: str, tokenizer: Tokenizer, tasks: HarnessTasks, store: Store
) -> dict[str, list[Row]]:
    """Ask one model.

    Returns:
        ``zero_shot``, of ``results.json`` without the model; ``example_scores``, for ``harness_pairs``;
        ``failed``, tasks that could not be asked to the end.
    """
    from sinktrain.evaluation.harness import SinktrainLM

    asked = SinktrainLM(model, tokenizer)
    rows: dict[str, list[Row]] = {"zero_shot": [], "example_scores": [], "failed": []}
    with contextlib.redirect_stdout(sys.stderr):
        for task, loaded in tasks.loaded.items():
            try:
                key = f"lm-eval-{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}-{_digest(loaded, tasks.limit)}"
                found = store.rows(key, partial(_measured, asked, loaded, tasks.limit))
            except Exception as error:  # as in load_tasks
                rows["failed"].append({"task": task, "error": f"{task} on {name}: {first_line(error)}"})
                continue
            rows["zero_shot"] += found["zero_shot"]
            rows["example_scores"] += found["example_scores"]
    return rows


def _digest(loaded: Any, limit: int | None) -> str:
    """Of all that the tasks ask."""
    digest = hashlib.sha256()
    for name, task in loaded["tasks"].items():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        asked = [[instance.request_type, instance.doc, instance.args] for instance in task.instances]
        digest.update(json.dumps([name, asked], default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _measured(asked: Any, loaded: Any, limit: int | None) -> dict[str, list[Row]]:
    from lm_eval.evaluator import evaluate

    # Without its bootstrap, which takes minutes for one error; those of means need none.
    results: Any = evaluate(lm=asked, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    rows: dict[str, list[Row]] = {"zero_shot": [], "example_scores": []}
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, chosen_by = key.partition(",")
            if not chosen_by or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            scores = _example_scores(results["samples"].get(task, []), metric, chosen_by)
            row = {"task": task, "metric": metric if chosen_by == "none" else f"{metric} ({chosen_by})"}
            rows["zero_shot"].append(
                row
                | {
                    "value": float(value) if math.isfinite(value) else None,
                    "stderr": _standard_error(scores, value),
                    "num_examples": int(metrics["sample_len"]),
                    "num_fewshot": int(results["n-shot"].get(task) or 0),
                    "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                }
            )
            if _is_mean(scores, value) and min(scores) >= 0 and max(scores) <= 1:
                rows["example_scores"].append(row | {"scores": scores})
    return rows


def _example_scores(samples: Sequence[Row], metric: str, chosen_by: str) -> list[float]:
    """A metric's number for each example; none where it has none."""
    scores = [sample.get(metric) for sample in samples if sample["filter"] == chosen_by]
    is_numeric = all(isinstance(one, int | float | np.number | np.bool_) for one in scores)
    return [float(one) for one in scores if one is not None] if is_numeric else []


def _is_mean(scores: Sequence[float], value: float) -> bool:
    return bool(scores) and math.isclose(float(np.mean(scores)), value, rel_tol=1e-9, abs_tol=1e-12)


def _standard_error(scores: Sequence[float], value: float) -> float | None:
    """Of a mean over examples, or of exp(-mean), a perplexity; None for other metrics."""
    if len(scores) < 2 or not np.isfinite([*scores, value]).all():
        return None
    error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    if _is_mean(scores, value):
        return error
    is_perplexity = value > 0 and _is_mean(scores, -math.log(value))
    return value * error if is_perplexity else None
