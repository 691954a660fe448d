"""The tables of what simulated quantisation costs, with the slots of sinks and without them."""

from __future__ import annotations

from collections.abc import Iterable

from sinktrain.report import wording
from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row, printable

NOTE = (
    "Nats that rounding adds, with 95% intervals; simulated, nothing gets faster. w8a8: weights and the "
    "inputs of linear layers in 8 bits, with one scale for all inputs of a layer, found on other text "
    "(static), or one for each token. kv8, kv4: cached keys and values in 8 or 4 bits, with a range for each "
    "token and head. Sink exact: its slots, those of the first four tokens where a model has no sink tokens, "
    "stay in full precision. Scales without sink: they were found without these slots."
)


def treatment_words(row: Row) -> str:
    """What a row does with the slots of sinks: ``all rounded``, ``sink exact``, …"""
    parts = ["scales without sink"] * (row["sink_in_statistics"] is False)
    parts += ["sink exact"] * row["sink_in_full_precision"]
    return ", ".join(parts) or "all rounded"


def quantized_texts(results: Results) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in results["quantized"]))


def quantized_table(results: Results, text: str) -> Table:
    """One row for each model and layout, one column for each scheme and treatment of the sink's slots."""
    rows = [row for row in results["quantized"] if row["text"] == text]
    columns = list(dict.fromkeys(map(_column, rows)))
    by_model: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_model.setdefault((row["model"], wording.layout_name(row)), {})[_column(row)] = row
    return Table(
        ["model", "layout", *columns],
        [
            [printable(model), layout, *(_cell(found.get(column)) for column in columns)]
            for (model, layout), found in by_model.items()
        ],
    )


def quantized_measurement_table(rows: Iterable[Row]) -> Table:
    """Rows of ``quantized[]`` with all their numbers."""
    return Table(
        ["model", "scheme", "sink", "layout", "tokens", "loss, nats", "rounded", "nats", "95% interval", "p"],
        [
            [
                printable(row["model"]),
                printable(row["scheme"]),
                treatment_words(row),
                wording.layout_name(row),
                f"{row['tokens_scored']:,}",
                *(
                    f"{row[key]:.{wording.digits(*row['ci95'])}f}"
                    for key in ("loss_nats", "quantized_loss_nats")
                ),
                wording.delta_text(row),
                wording.delta_interval_text(row),
                wording.p_text(row["p"]),
            ]
            for row in rows
        ],
    )


def _column(row: Row) -> str:
    return f"{printable(row['scheme'])}: {treatment_words(row)}"


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{wording.delta_text(row)} ({wording.delta_interval_text(row)})"
