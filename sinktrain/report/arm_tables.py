"""The tables with a row an arm: what each remedy does, and how sure its seeds make it.

An arm of one seed, and a model without an arm, stand for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

from sinktrain.report import wording
from sinktrain.report.contests import Subject, lengths_of, own_rows, subjects_of
from sinktrain.report.findings import texts
from sinktrain.report.over_seeds import over_seeds_text
from sinktrain.report.probe_tables import is_null, place_words, sink_rows
from sinktrain.report.quantized_tables import treatment_words
from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row

ARM_NOTE = (
    "Losses in nats. Means over seeds, ± half of their 95% intervals over seeds. Outliers: the largest "
    "hidden value of a layer over the median one, in the layer where that is largest, and the same without "
    "the first position. Losses of models with different tokenizers can't be compared."
)
OUTLIERS = {"outliers": "top1_over_median", "without the first": "top1_over_median_without_first"}
ROUNDING_NOTE = (
    "In the arm's own layout; means over seeds, ± half of their 95% intervals over seeds. Columns of one arm "
    "share their seeds, so they may differ measurably by less."
)
SEED_NOTE = (
    "Losses in nats; the last column is where one more seed of an arm, looked at by itself, is to be "
    "expected. The smallest deviation of many arms is mostly so by luck, its intervals too narrow."
)


def has_arms(results: Results) -> bool:
    """Whether a row of these tables stands for several models."""
    return any(len(subject.models) > 1 for subject in subjects_of(results))


def arm_table(results: Results, text: str) -> Table:
    """The losses of the greatest length and dense of every arm.

    On the first text, which telemetry reads, the sink metric and outliers besides.
    """
    rows = _rows_of_length(results, (row for row in results["perplexity"] if row["text"] == text))
    layouts = wording.layout_names(rows)
    metrics = [row for row in sink_rows(results) if row["eps"] == _smallest_eps(results)]
    is_first = text == texts(results)[0]
    return Table(
        ["arm", "seeds", *layouts, *["sink metric", "of", *OUTLIERS] * is_first],
        [
            [
                subject.shown,
                str(len(subject.models)),
                *(_loss_cell(subject, rows, layout) for layout in layouts),
                *[*_metric_cells(subject, metrics), *_outlier_cells(subject, results["norms"])] * is_first,
            ]
            for subject in subjects_of(results)
        ],
    )


def seed_table(results: Results, text: str) -> Table:
    """Every arm's loss over its seeds, in the layouts of the greatest length and dense."""
    rows = _rows_of_length(results, (row for row in results["arms"] if row["text"] == text))
    return Table(
        ["arm", "layout", "seeds", "loss, nats", "deviation", "95% of the mean", "95% of another seed"],
        [
            [
                wording.printable(row["arm"]),
                wording.layout_name(row),
                str(row["num_seeds"]),
                f"{row['loss_nats']:.{wording.digits(*row['ci95'])}f}",
                f"{row['deviation_nats']:.4f}",
                wording.loss_interval_text(row),
                wording.loss_interval_text({"ci95": row["prediction95"]}),
            ]
            for row in rows
        ],
    )


def rounding_table(results: Results, text: str) -> Table:
    """What each scheme of quantisation adds in the arm's own layout."""
    streamed = (row for row in results["quantized"] if (row["text"], row["policy"]) == (text, "streaming"))
    rows = own_rows(results, streamed)
    columns = list(dict.fromkeys((row["scheme"], treatment_words(row)) for row in rows))
    return Table(
        ["arm", *(f"{wording.printable(scheme)}: {treatment}" for scheme, treatment in columns)],
        [
            [subject.shown, *(_added_cell(subject, rows, column) for column in columns)]
            for subject in subjects_of(results)
        ],
    )


def _rows_of_length(results: Results, rows: Iterable[Row]) -> list[Row]:
    """Those that stream at the greatest length, and dense."""
    greatest = lengths_of(results)[:1]
    return [
        row
        for row in rows
        if row["policy"] == "dense" or (row["policy"] == "streaming" and wording.num_slots(row) in greatest)
    ]


def _loss_cell(subject: Subject, rows: Iterable[Row], layout: str) -> str:
    losses = [row["loss_nats"] for row in _of(subject, rows) if wording.layout_name(row) == layout]
    return over_seeds_text(losses, ".3f")


def _metric_cells(subject: Subject, metrics: Iterable[Row]) -> tuple[str, str]:
    """The metric of what the arm has for a sink: its tokens, its null slot, or else the first token."""
    rows = sorted(_of(subject, metrics), key=lambda row: (not row["is_sink"], not is_null(row)))
    if not rows:
        return "", ""
    place = place_words(rows[0])
    values = [row["value"] for row in rows if place_words(row) == place]
    return over_seeds_text(values, ".1%"), place


def _smallest_eps(results: Results) -> float | None:
    return min((row["eps"] for row in results["sink_metric"]), default=None)


def _outlier_cells(subject: Subject, norms: Iterable[Row]) -> list[str]:
    """Of the worst layer of each model."""
    trained = [row for row in _of(subject, norms) if row["weights"] == "trained"]
    models = dict.fromkeys(row["model"] for row in trained)
    return [
        over_seeds_text(
            [max(row[key] for row in trained if row["model"] == model) for model in models], ",.1f"
        )
        for key in OUTLIERS.values()
    ]


def _added_cell(subject: Subject, rows: Iterable[Row], column: tuple[str, str]) -> str:
    """``0.0054 ± 0.0010``: what a scheme adds to the loss, in nats."""
    added = [row for row in _of(subject, rows) if (row["scheme"], treatment_words(row)) == column]
    return over_seeds_text([row["delta_nats"] for row in added], "z.4f")


def _of(subject: Subject, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["model"] in subject.model_names]
