"""The tables of losses: perplexities, differences, removals, every measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sinktrain.report import wording
from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row

REMOVAL_WORDS = {1: "loses", 0: "no measurable difference", -1: "gains"}


def perplexity_cells(results: Results, text: str, cell: Callable[[Row], str]) -> Table:
    """One row per model, one column per layout; ``cell`` words a row of ``perplexity[]``."""
    measured = [row for row in results["perplexity"] if row["text"] == text]
    layouts = wording.layout_names(measured)
    cells = {(row["model"], wording.layout_name(row)): cell(row) for row in measured}
    models = list(dict.fromkeys(row["model"] for row in measured))
    return Table(
        ["model", *layouts],
        [
            [wording.printable(model), *(cells.get((model, layout), "") for layout in layouts)]
            for model in models
        ],
    )


def perplexity_cell(row: Row) -> str:
    return wording.perplexity_text(row["perplexity"])


def bits_cell(row: Row) -> str:
    return "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"


def perplexity_table(results: Results, text: str) -> Table:
    """Perplexities with the interval of the loss behind them."""
    return perplexity_cells(
        results, text, lambda row: f"{perplexity_cell(row)} ({wording.loss_interval_text(row)})"
    )


def bits_table(results: Results, text: str) -> Table:
    """Bits per byte: what models of different tokenizers are compared in."""
    return perplexity_cells(results, text, bits_cell)


def difference_table(results: Results, text: str) -> Table:
    """Every pair of a text."""
    return pair_table(pair for pair in results["paired"] if pair["text"] == text)


def pair_table(pairs: Iterable[Row]) -> Table:
    """One row per pair: what, where, how much, how sure; over seeds, the difference of each seed."""
    return Table(
        ["difference", "layout", "nats", "95% interval", "over", "p", "in words"],
        [
            [
                *wording.pair_words(pair),
                wording.delta_text(pair),
                wording.delta_interval_text(pair),
                _over_cell(pair),
                wording.p_text(pair["p"]),
                wording.verdict(pair),
            ]
            for pair in pairs
        ],
    )


def _over_cell(pair: Row) -> str:
    """``text``, ``seeds (-0.012, -0.020)``, or ``3 seeds`` where the arms' seeds are not the same."""
    if pair["interval"] != "seeds" or not pair["deltas"]:
        return wording.over_text(pair)
    places = wording.digits(*pair["ci95"])
    return f"seeds ({', '.join(f'{delta:+z.{places}f}' for delta in pair['deltas'])})"


def measurement_table(results: Results, text: str) -> Table:
    """Every measurement of ``perplexity[]`` with all its numbers."""
    return Table(
        ["model", "layout", "tokens scored", "loss, nats", "95% interval", "perplexity", "bits per byte"],
        [
            [
                wording.printable(row["model"]),
                wording.layout_name(row),
                f"{row['tokens_scored']:,}",
                f"{row['loss_nats']:.{wording.digits(*row['ci95'])}f}",
                wording.loss_interval_text(row),
                perplexity_cell(row),
                bits_cell(row),
            ]
            for row in results["perplexity"]
            if row["text"] == text
        ],
    )


def removal_table(results: Results, text: str) -> Table:
    """What the first tokens are worth: taken away, or with line breaks in their place."""
    return Table(
        ["model", "changed", "layout", "loss, nats", "changed loss", "nats", "95% interval", "p", "in words"],
        [
            [
                wording.printable(row["model"]),
                change_words(row),
                wording.layout_name(row),
                *(
                    f"{row[key]:.{wording.digits(*row['ci95'])}f}"
                    for key in ("loss_nats", "changed_loss_nats")
                ),
                wording.delta_text(row),
                wording.delta_interval_text(row),
                wording.p_text(row["p"]),
                REMOVAL_WORDS[wording.sign(row)],
            ]
            for row in results["removal"]
            if row["text"] == text
        ],
    )


def change_words(row: Row) -> str:
    """``first token removed``, ``4 kept tokens made line breaks``."""
    count = row["num_tokens"]
    if row["test"] == "removed":
        return "first token removed" if count == 1 else f"first {count} tokens removed"
    return "kept token made a line break" if count == 1 else f"{count} kept tokens made line breaks"
