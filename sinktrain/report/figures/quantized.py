"""Plots of what simulated quantisation costs, with the slots of sinks and without them."""

from __future__ import annotations

from sinktrain.report.figures.look import Spec, model_looks
from sinktrain.report.figures.source import Source, drawn_models
from sinktrain.report.figures.spec import Figure, points, whisker_layout
from sinktrain.report.quantized_tables import treatment_words
from sinktrain.report.wording import Results, Row, printable


def quantized_figures(results: Results, text: str) -> list[Figure]:
    """A plot for each scheme, on its own scale; a row for each reading and treatment of the sink's slots."""
    drawn, looks = drawn_models(results), model_looks(results)
    rows = Source.of(results, "quantized").where(lambda row: row["text"] == text and row["model"] in drawn)
    figures = []
    for scheme, group in rows.by(lambda row: row["scheme"]).items():
        traces = []
        for model, of_model in group.by(lambda row: row["model"]).items():
            fields: Spec = {"y": "delta_nats", "low": "ci95.0", "high": "ci95.1", "unit": " nats"}
            places = list(map(_words, of_model.rows))
            traces.append(points(of_model, model, looks[model], places=places, offsetgroup=model, **fields))
        words = sorted(dict.fromkeys(map(_words, group.rows)), key=lambda word: word.startswith("dense"))
        frame = whisker_layout("loss added, nats", words, traces, has_zero=True)
        caption = f"{printable(scheme)} on {text}; whiskers: 95% over text; own scale"
        figures.append(Figure(f"quantized/{text}/{scheme}", caption, traces, frame))
    return figures


def _words(row: Row) -> str:
    return f"{row['policy']}, {treatment_words(row)}"
