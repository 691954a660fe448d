"""Plots of how runs went: held-out loss, streaming gap and sink metrics against tokens seen."""

from __future__ import annotations

from sinktrain.report.figures.look import model_looks
from sinktrain.report.figures.source import Source
from sinktrain.report.figures.spec import Figure, axis, layout, points
from sinktrain.report.training_tables import CAPTIONS
from sinktrain.report.wording import Results


def training_figures(results: Results) -> list[Figure]:
    """One plot for each metric, a line for each run that measured it."""
    looks = model_looks(results)
    figures = []
    for metric, of_metric in Source.of(results, "training").by(lambda row: row["metric"]).items():
        traces = [
            points(run, model, looks[model], x="tokens_seen", y="value", mode="lines", line={"width": 1.4})
            for model, run in of_metric.by(lambda row: row["model"]).items()
        ]
        shown = {"tickformat": ".0%"} if metric.startswith("sink/") else {}
        frame = layout(axis("tokens seen"), axis("", **shown), 300)
        figures.append(Figure(f"training/{metric}", CAPTIONS[metric], traces, frame))
    return figures
