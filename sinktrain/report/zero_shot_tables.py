"""Scores of lm-evaluation-harness: models side by side, and their differences example by example."""

from __future__ import annotations

from collections.abc import Iterator

from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row, is_measurable, p_text, printable, ratio_text

ABOUT = (
    "Read at once, not streamed, each model's sink in front of every window; in brackets one standard error. "
    "Differences are paired example by example, their 95% intervals are over the examples, not over seeds."
)


def zero_shot_table(results: Results) -> Table:
    """One row for each task and metric, one column for each model."""
    names = list(dict.fromkeys(row["model"] for row in results.get("zero_shot", [])))
    return Table(
        ["task", "metric", "examples", *map(printable, names)],
        [
            [
                printable(first["task"]),
                printable(first["metric"]),
                f"{first['num_examples']:,}{_shots(first)}",
                *(_score_text(by_model.get(name)) for name in names),
            ]
            for by_model in _grouped(results)
            for first in [next(iter(by_model.values()))]
        ],
    )


def zero_shot_pair_table(results: Results) -> Table:
    """Rows of ``zero_shot_paired[]``."""
    return Table(
        ["task", "metric", "models", "difference", "95% interval", "p", "better"],
        [
            [
                printable(pair["task"]),
                printable(pair["metric"]),
                f"{printable(pair['a'])} - {printable(pair['b'])}",
                f"{pair['delta']:+z.3f}",
                _interval_text(pair),
                p_text(pair["p"]),
                _better(results, pair),
            ]
            for pair in results.get("zero_shot_paired", [])
        ],
    )


def zero_shot_lines(results: Results) -> Iterator[str]:
    """A line for each task and metric: scores, and differences where they are paired."""
    for by_model in _grouped(results):
        first = next(iter(by_model.values()))
        scores = ", ".join(f"{printable(name)} {_score_text(row)}" for name, row in by_model.items())
        pairs = [
            f"{printable(pair['a'])} - {printable(pair['b'])} {pair['delta']:+z.3f} ({_interval_text(pair)})"
            for pair in results.get("zero_shot_paired", [])
            if (pair["task"], pair["metric"]) == (first["task"], first["metric"])
        ]
        yield "; ".join([f"{printable(first['task'])} {printable(first['metric'])}: {scores}", *pairs])


def _grouped(results: Results) -> list[dict[str, Row]]:
    """Rows by model, for each task and metric."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.get("zero_shot", []):
        groups.setdefault((row["task"], row["metric"]), {})[row["model"]] = row
    return list(groups.values())


def _shots(row: Row) -> str:
    return f", {row['num_fewshot']}-shot" if row["num_fewshot"] else ""


def _score_text(row: Row | None) -> str:
    """``0.314 (0.009)``: a score and its standard error."""
    if row is None:
        return ""
    value = "not finite" if row["value"] is None else ratio_text(row["value"])
    return value if row["stderr"] is None else f"{value} ({ratio_text(row['stderr'])})"


def _interval_text(pair: Row) -> str:
    low, high = (f"{end:+z.3f}" for end in pair["ci95"])
    return f"{low} to {high}"


def _better(results: Results, pair: Row) -> str:
    """The better model's name, where the interval leaves zero out and the metric says which way is up."""
    directions = [
        row["higher_is_better"]
        for row in results.get("zero_shot", [])
        if (row["task"], row["metric"]) == (pair["task"], pair["metric"])
    ]
    if not is_measurable(pair):
        return "no measurable difference"
    if not directions or directions[0] is None:
        return ""
    return printable(pair["a"] if (pair["delta"] > 0) == directions[0] else pair["b"])
