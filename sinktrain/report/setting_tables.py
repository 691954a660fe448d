"""The tables of what was compared, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row, printable


def model_table(results: Results) -> Table:
    """What was compared."""
    return Table(
        ["model", "sink", "parameters", "tokens seen", "seed", "arm", "source"],
        [
            [
                printable(model["name"]),
                sink_words(model),
                f"{model['parameters']:,}",
                "" if model["tokens_seen"] is None else f"{model['tokens_seen']:,}",
                "" if model["seed"] is None else str(model["seed"]),
                "" if model["arm"] is None else printable(model["arm"]),
                printable(model["source"]),
            ]
            for model in results["models"]
        ],
    )


def sink_words(model: Row) -> str:
    """``none``, ``1 token (id 50277)``, ``gate: a sigmoid gate on …``."""
    sink = model["sink"]
    if not sink["count"]:
        about = "" if sink["kind"] == "none" else model.get("sink_about", "")
        return printable(": ".join(filter(None, [sink["kind"], about])))
    ids = ", ".join(str(token_id) for token_id in sink["token_ids"])
    return f"{sink['count']} token{'s' * (sink['count'] > 1)} (id {ids})"


def environment_table(results: Results) -> Table:
    """Where it was measured, one setting a row; nested settings with dotted names."""
    return Table(["environment", "value"], [[name, value] for name, value in _flat(results["environment"])])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            as_text = value if isinstance(value, str) else json.dumps(value)
            yield printable(prefix + name), printable(as_text)
