"""The tables of a report: what stands in them, on the terminal and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sinktrain.report import findings
from sinktrain.report.findings import Results, Row

COLUMN_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Header and cells, all as plain text; the first column names its row."""

    header: list[str]
    rows: list[list[str]]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand right-aligned."""
        return all(row[column][:1] in set("+-<0123456789") | {""} for row in self.rows)


def perplexity_cells(results: Results, text: str, cell: Callable[[Row], str]) -> Table:
    """One row per model, one column per layout; ``cell`` words a row of ``perplexity[]``."""
    measured = [row for row in results["perplexity"] if row["text"] == text]
    layouts = findings.layout_names(measured)
    cells = {(row["model"], findings.layout_name(row)): cell(row) for row in measured}
    models = list(dict.fromkeys(row["model"] for row in measured))
    return Table(
        ["model", *layouts],
        [
            [findings.printable(model), *(cells.get((model, layout), "") for layout in layouts)]
            for model in models
        ],
    )


def perplexity_cell(row: Row) -> str:
    return findings.perplexity_text(row["perplexity"])


def perplexity_table(results: Results, text: str) -> Table:
    """Perplexities with the interval of the loss behind them."""
    return perplexity_cells(
        results, text, lambda row: f"{perplexity_cell(row)} ({findings.loss_interval_text(row)})"
    )


def difference_table(results: Results, text: str) -> Table:
    """One row per pair: what, where, how much, how sure."""
    return Table(
        ["difference", "layout", "nats", "95% interval", "over", "p", "in words"],
        [
            [
                *findings.pair_words(pair),
                findings.delta_text(pair),
                findings.delta_interval_text(pair),
                pair["interval"],
                findings.p_text(pair["p"]),
                findings.verdict(pair),
            ]
            for pair in results["paired"]
            if pair["text"] == text
        ],
    )


def measurement_table(results: Results, text: str) -> Table:
    """Every measurement of ``perplexity[]`` with all its numbers."""
    return Table(
        ["model", "layout", "tokens scored", "loss, nats", "95% interval", "perplexity", "bits per byte"],
        [
            [
                findings.printable(row["model"]),
                findings.layout_name(row),
                f"{row['tokens_scored']:,}",
                f"{row['loss_nats']:.{findings.digits(*row['ci95'])}f}",
                findings.loss_interval_text(row),
                perplexity_cell(row),
                "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
            ]
            for row in results["perplexity"]
            if row["text"] == text
        ],
    )


def model_table(results: Results) -> Table:
    """What was compared."""
    return Table(
        ["model", "sink", "parameters", "tokens seen", "seed", "arm", "source"],
        [
            [
                findings.printable(model["name"]),
                sink_words(model["sink"]),
                f"{model['parameters']:,}",
                "" if model["tokens_seen"] is None else f"{model['tokens_seen']:,}",
                "" if model["seed"] is None else str(model["seed"]),
                "" if model["arm"] is None else findings.printable(model["arm"]),
                findings.printable(model["source"]),
            ]
            for model in results["models"]
        ],
    )


def sink_words(sink: Mapping[str, Any]) -> str:
    """``none``, ``1 token (id 50277)``."""
    if sink["kind"] != "token":
        return str(sink["kind"])
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
            yield findings.printable(prefix + name), findings.printable(as_text)


def terminal_table(results: Results, width: int = 100) -> str:
    """What ``sinktrain compare`` prints: perplexities per model and layout, then the differences in words.

    Args:
        width: columns of the terminal; where layouts do not fit side by side they go on below.
    """
    return "\n\n".join(_terminal_text(results, text, width) for text in findings.texts(results))


def _terminal_text(results: Results, text: str, width: int) -> str:
    scored = [row for row in results["perplexity"] if row["text"] == text]
    perplexities = perplexity_cells(results, text, perplexity_cell)
    intervals = perplexity_cells(results, text, lambda row: findings.loss_interval_text(row, joiner="-"))
    lines = [
        f"{findings.printable(text)}: perplexity ({findings.tokens_scored(scored)}); "
        "below it the 95% interval of the loss in nats",
        "",
        *_aligned(perplexities, intervals, width),
    ]
    pairs = [pair for pair in results["paired"] if pair["text"] == text]
    if pairs:
        lines += ["", "difference in loss, token by token (below zero: the first is better)"]
        lines += [f"  {findings.difference_words(pair)}" for pair in pairs]
    return "\n".join(lines)


def _aligned(upper: Table, lower: Table, width: int) -> Iterator[str]:
    """Rows of two lines each, columns right-aligned, in as many bands as the width asks for."""
    name_width = max(len(row[0]) for row in (upper.header, *upper.rows))
    cells = [upper.header, *upper.rows, *lower.rows]
    cell_width = max(len(cell) for row in cells for cell in row[1:])
    per_band = max(1, (width - name_width) // (cell_width + len(COLUMN_GAP)))
    for first in range(1, len(upper.header), per_band):

        def line(name: str, row: list[str], first: int = first) -> str:
            band = row[first : first + per_band]
            return COLUMN_GAP.join([name.ljust(name_width), *(cell.rjust(cell_width) for cell in band)])

        if first > 1:
            yield ""
        yield line("model", upper.header)
        for above, below in zip(upper.rows, lower.rows, strict=True):
            yield line(above[0], above)
            yield line("", below)


def results_markdown(results: Results) -> str:
    """``results.md``: the findings, the tables, what was measured, and how to read it."""
    parts = ["# Streaming comparison", _bullets(findings.headline(results))]
    for text in findings.texts(results):
        scored = [row for row in results["perplexity"] if row["text"] == text]
        parts += [
            f"## Perplexity on {_markdown_text(text)}",
            f"{findings.tokens_scored(scored)}; in brackets the 95% interval of the loss in nats, over text.",
            _markdown_table(perplexity_table(results, text)),
        ]
        differences = difference_table(results, text)
        if differences.rows:
            parts += [
                "### Differences in loss",
                "Token by token on the same text; below zero, the first is better.",
                _markdown_table(differences),
            ]
        parts += ["### All measurements", _markdown_table(measurement_table(results, text))]
    parts += ["## How to read it", " ".join(findings.READING)]
    if findings.limits(results):
        parts += ["## Limits", _bullets(findings.limits(results))]
    parts += ["## Models", _markdown_table(model_table(results))]
    if results["environment"]:
        parts += ["## Environment", _markdown_table(environment_table(results))]
    return "\n\n".join(parts) + "\n"


def _bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {_markdown_text(sentence)}" for sentence in sentences)


def _markdown_table(table: Table) -> str:
    rule = ["---:" if table.is_numeric(column) else "---" for column in range(len(table.header))]
    return "\n".join(
        f"| {' | '.join(map(_markdown_text, row))} |" for row in (table.header, rule, *table.rows)
    )


def _markdown_text(text: str) -> str:
    """Plain text that Markdown shows as it stands."""
    text = findings.printable(text)
    for mark in "\\`*_[]|~<&":
        text = text.replace(mark, "\\" + mark)
    return text
