"""Plots of losses: by model and layout, and by stream position."""

from __future__ import annotations

from collections.abc import Callable

from sinktrain.report import wording
from sinktrain.report.figures.look import Look, Spec, model_looks
from sinktrain.report.figures.source import Source, drawn_models
from sinktrain.report.figures.spec import (
    Figure,
    axis,
    layout,
    log_axis,
    marks,
    padded,
    points,
    whisker_layout,
)
from sinktrain.report.wording import Results, Row


def loss_figures(results: Results, text: str) -> list[Figure]:
    """Loss by layout, a series for each model; bits per byte where models have tokenizers of their own."""
    rows = Source.of(results, "perplexity").where(lambda row: row["text"] == text)
    in_bits = len({model["tokenizer"] for model in results["models"]}) > 1
    if in_bits:
        rows = rows.where(lambda row: row["bits_per_byte"] is not None)
    if not rows:
        return []
    quantity = "bits per byte" if in_bits else "loss, nats"
    fields: Spec = (
        {"y": "bits_per_byte"} if in_bits else {"y": "loss_nats", "low": "ci95.0", "high": "ci95.1"}
    )
    looks = model_looks(results)
    traces = [
        points(
            of_model,
            model,
            looks[model],
            places=[wording.layout_name(row) for row in of_model.rows],
            offsetgroup=model,
            **fields,
        )
        for model, of_model in rows.by(lambda row: row["model"]).items()
    ]
    note = "" if in_bits else "; whiskers: 95% over text"
    caption = f"{quantity.split(',')[0].capitalize()} by model and layout on {text}{note}"
    frame = whisker_layout(quantity, wording.layout_names(rows.rows), traces)
    return [Figure(f"loss/{text}", caption, traces, frame)]


def position_figures(results: Results, text: str) -> list[Figure]:
    """Loss by stream position: a panel for each model and length, all on one scale, evictions marked.

    Recomputed losses are left out: they are of few tokens, far apart, and would show the text's ups and
    downs.
    """
    drawn = drawn_models(results)
    rows = Source.of(results, "position_loss").where(
        lambda row: (
            row["text"] == text
            and row["model"] in drawn
            and row["policy"] != "recompute"
            and row["stream_pos"]
        )
    )
    y_range = padded([{"y": rows.values("loss_nats")}], "y") if rows else []
    figures = []
    for model, of_model in rows.by(lambda row: row["model"]).items():
        bounded = of_model.where(lambda row: row["policy"] != "dense")
        for length in dict.fromkeys(bounded.values("sinks+window")) or [0]:
            note = f", N = {length:,}" if length else ""
            panel = of_model.where(_is_dense_or_of(length))
            name = f"position/{text}/{model}/{length}"
            figures.append(_position_figure(name, f"{model} on {text}{note}", panel, y_range))
    return figures


def _is_dense_or_of(length: int) -> Callable[[Row], bool]:
    return lambda row: row["policy"] == "dense" or wording.num_slots(row) == length


def _position_figure(name: str, caption: str, panel: Source, y_range: list[float]) -> Figure:
    lines = panel.by(wording.layout_name)
    traces = [
        points(
            lines[words], words, Look.of(series), x="stream_pos", y="loss_nats", mode="lines", unit=" nats"
        )
        for series, words in enumerate(wording.layout_names(panel.rows))
    ]
    x = log_axis("stream position, tokens", traces, "x")
    evictions = marks(panel.where(lambda row: row["policy"] == "streaming"), "sinks+window")
    return Figure(name, caption, traces, layout(x, axis("loss, nats", range=y_range), **evictions))
