"""Which model of a comparison a card is about; the comparison without the places where things lay."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinktrain.errors import ExportError
from sinktrain.model.checkpoints import ModelSource
from sinktrain.model.config import ModelConfig
from sinktrain.model.hub import is_hub_id
from sinktrain.report.reading import read_results
from sinktrain.report.wording import Results, Row, printable

MOST_OTHERS = 3
"""Models beside this one in a table and its picture: more make both too wide to read."""

PUBLIC_OPTIONS = (
    "--layouts",
    "--policies",
    "--tasks",
    "--task-limit",
    "--quantize",
    "--max-tokens",
    "--streams",
    "--recompute-tokens",
    "--verify",
    "--dtype",
)
"""Of the command that measured: those whose values are no paths."""

_VALUE = re.compile(r"[\w.,+:-]{1,200}")


@dataclass(frozen=True)
class Compared:
    """A comparison that holds this model.

    Args:
        results: of ``results.json``, without paths: models and texts are called by their last names.
        model: the row of ``models[]`` that is this model.
    """

    results: Results
    model: Row

    @property
    def name(self) -> str:
        """What the results call this model."""
        return str(self.model["name"])

    @property
    def rows(self) -> list[Row]:
        """This model's of ``perplexity[]``."""
        return [row for row in self.results["perplexity"] if row["model"] == self.name]

    @property
    def shown(self) -> Results:
        """This model first, then the vanilla ones and others, as many as a table has room for."""
        others = [model for model in self.results["models"] if model is not self.model]
        others.sort(key=lambda model: bool(model["sink"]["kind"] != "none"))
        models = [self.model, *others[:MOST_OTHERS]]
        places = {model["name"]: place for place, model in enumerate(models)}
        rows = [row for row in self.results["perplexity"] if row["model"] in places]
        return {
            **self.results,
            "models": models,
            "perplexity": sorted(rows, key=lambda row: places[row["model"]]),
        }


def read_compared(path: Path, origin: ModelSource, config: ModelConfig, num_parameters: int) -> Compared:
    """The comparison of a ``results.json``, or of its folder, and which of its models this one is.

    Models are told apart by what is known of their training and by their sinks; by their names where that
    leaves several, or where nothing is known.

    Raises:
        ConfigError: there is no such file, or it is not results of this schema version.
        ExportError: it does not hold this model, or several that may be it.
    """
    results = read_results(path.expanduser())
    facts = {key: getattr(origin, key) for key in ("arm", "seed", "tokens_seen")}
    sink = config.sink.to_dict()
    alike = [
        model
        for model in results["models"]
        if model["parameters"] == num_parameters
        and all(model[key] == value for key, value in facts.items())
        and all(model["sink"][key] == value for key, value in sink.items())
    ]
    named = [model for model in alike if origin.name == model["name"] or origin.source == model["source"]]
    found = named or (alike if origin.tokens_seen is not None else [])
    if len(found) == 1:
        place = results["models"].index(found[0])
        public = without_paths(results)
        return Compared(public, public["models"][place])
    problem = "holds several models like" if found else "does not hold"
    held = ", ".join(map(_fact_words, results["models"]))
    raise ExportError(
        f"--results {path} {problem} {origin.source} ({_fact_words(facts | {'sink': sink})}); "
        f"it holds {printable(held)}; name a comparison of this very checkpoint, "
        "or leave --results out"
    )


def _fact_words(model: Row) -> str:
    """``sink: token, seed 1, 3,276,800 tokens``; of what is known."""
    facts = [
        None if model["arm"] is None else str(model["arm"]),
        None if model["seed"] is None else f"seed {model['seed']}",
        None if model["tokens_seen"] is None else f"{model['tokens_seen']:,} tokens",
    ]
    words = ", ".join(filter(None, facts)) or f"sink {model['sink']['kind']}"
    return f"{model['name']}: {words}" if "name" in model else words


def without_paths(results: Results) -> dict[str, Any]:
    """The same results, less where things lay: names that are paths become their last parts."""
    models = _last_names(model["name"] for model in results["models"])
    texts = _last_names((row["text"] for row in results["perplexity"]), may_be_ids=False)
    failed = _last_names(row["model"] for row in results["failed"])
    lists = {
        name: [_renamed(row, models, texts) for row in rows]
        for name, rows in results.items()
        if isinstance(rows, list) and name not in ("models", "failed")
    }
    return {
        **lists,
        "schema_version": results["schema_version"],
        "environment": {"command": public_command(results, models, texts)},
        "models": [{**model, "name": models[model["name"]], "source": ""} for model in results["models"]],
        "failed": [
            {"model": failed[row["model"]], "error": "its error is not told here"}
            for row in results["failed"]
        ],
    }


def _renamed(row: Row, models: dict[str, str], texts: dict[str, str]) -> dict[str, Any]:
    is_of_arms = row.get("interval") == "seeds"
    names = {key: {} if is_of_arms else models for key in ("model", "a", "b")} | {"text": texts}
    return {key: names[key].get(value, value) if key in names else value for key, value in row.items()}


def _last_names(names: Iterable[str], may_be_ids: bool = True) -> dict[str, str]:
    """A name that tells no place for each: Hub ids stay, of paths the last part, numbered where alike."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        is_id = may_be_ids and is_hub_id(name)
        last = name if is_id else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "model"
        number = sum(1 for other in found.values() if other.partition(" (")[0] == last)
        found[name] = f"{last} ({number + 1})" if number else last
    return found


def public_command(results: Results, models: dict[str, str], texts: dict[str, str]) -> str | None:
    """The command that measured, its paths replaced by names; None where the results don't have it."""
    try:
        typed = shlex.split(str(results["environment"]["command"]))
    except (KeyError, ValueError):
        return None
    if typed[:1] != ["sinktrain"] or len(typed) < 2 or typed[1] not in ("evaluate", "compare"):
        return None
    words = typed[:2] + [models[model["name"]] for model in results["models"]]
    for text in texts.values():
        words += ["--text", text]
    return shlex.join([*words, *_public_options(typed[2:]), "--out", "DIR"])


def _public_options(typed: list[str]) -> Iterator[str]:
    for place, word in enumerate(typed):
        option, equals, value = word.partition("=")
        if option in PUBLIC_OPTIONS:
            value = value if equals else "".join(typed[place + 1 : place + 2])
            if _VALUE.fullmatch(value):
                yield from (option, value)
