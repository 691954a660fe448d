"""A ``results.json`` read back, checked against the published schema."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

from sinktrain import __version__
from sinktrain.errors import ConfigError, first_line
from sinktrain.report.wording import Results

SCHEMA_VERSION = 1
LONGEST_VALUE = 60
LISTS_OF_MODELS = (
    "perplexity",
    "position_loss",
    "latency",
    "sink_metric",
    "sink_attention",
    "norms",
    "removal",
    "streameval",
    "zero_shot",
    "verified",
    "training",
)
LISTS_OF_PAIRS = ("paired", "zero_shot_paired")
GAINED_LISTS = ("arms", "training", "zero_shot", "zero_shot_paired")
"""That results of an older version lack."""
MUST_BE = {
    "minimum": "at least ",
    "maximum": "at most ",
    "minItems": "of at least this many values: ",
    "maxItems": "of at most this many values: ",
}


def read_results(path: Path) -> dict[str, Any]:
    """Read the results of ``sinktrain evaluate`` or ``compare``.

    Args:
        path: a ``results.json``, or the folder of a report.

    Raises:
        ConfigError: there is no such file, or it is not results of this schema version.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        results = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); name a results.json of sinktrain compare"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({first_line(error)}); name a results.json of sinktrain compare"
        ) from None
    _check_version(path, results)
    results = {name: [] for name in GAINED_LISTS} | results
    problem = best_match(results_validator().iter_errors(results))
    if problem is not None:
        raise ConfigError(f"{path}: {_problem_words(problem)}; measure again, or mend the file")
    _check_names(path, results)
    return dict(results)


@cache
def results_validator() -> Any:
    """The published schema, ``results.schema.json`` beside this module, as a jsonschema validator."""
    schema = (files(__package__) / "results.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(schema))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError(f"{digits} is too large a number")
    return float(digits)


def _check_version(path: Path, results: Any) -> None:
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version is None:
        raise ConfigError(
            f"{path} is not a results.json of sinktrain: it has no schema_version; "
            "name the one that sinktrain compare wrote"
        )
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ConfigError(
            f"{path} is of schema version {json.dumps(version)[:LONGEST_VALUE]}, this sinktrain "
            f"{__version__} reads {SCHEMA_VERSION}; use the sinktrain that wrote it, or measure again"
        )


def _check_names(path: Path, results: Results) -> None:
    """What the schema can't say: rows speak of models and arms that are there."""
    models = {model["name"] for model in results["models"]}
    arms = {model["arm"] for model in results["models"]}
    named: dict[str, tuple[str, ...]] = {"arms": ("arm",)}
    named |= {**dict.fromkeys(LISTS_OF_MODELS, ("model",)), **dict.fromkeys(LISTS_OF_PAIRS, ("a", "b"))}
    for name, keys in named.items():
        for number, row in enumerate(results[name]):
            known = arms if name == "arms" or row.get("interval") == "seeds" else models
            for key in keys:
                if row[key] not in known:
                    raise ConfigError(
                        f"{path}: {name}[{number}].{key} is {json.dumps(row[key])}, which is not in models; "
                        "measure again, or mend the file"
                    )


def _problem_words(error: ValidationError) -> str:
    """``perplexity[3].loss_nats is "low" but must be number``, ``paired[0] has no p``."""
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    place = place.removeprefix(".") or "the file"
    wanted = error.validator_value
    if error.validator == "required":
        return f"{place} has no {next(name for name in wanted if name not in error.instance)}"
    if error.validator == "dependentRequired":
        missing = {name for given in wanted if given in error.instance for name in wanted[given]}
        return f"{place} has no {min(missing - set(error.instance))}"
    value = json.dumps(error.instance)
    value = value if len(value) <= LONGEST_VALUE else f"{value[: LONGEST_VALUE - 1]}…"
    words = " or ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)
    return f"{place} is {value} but must be {MUST_BE.get(error.validator, '')}{words}"
