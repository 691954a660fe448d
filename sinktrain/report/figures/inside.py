"""Plots of what happens inside, beside the same network untrained: the sink metric, and sizes by layer."""

from __future__ import annotations

from sinktrain.report.figures.look import SOFT, Look, Spec, model_looks
from sinktrain.report.figures.source import Source, drawn_models
from sinktrain.report.figures.spec import Figure, axis, layout, log_axis, points
from sinktrain.report.probe_tables import is_null
from sinktrain.report.wording import Results

WEIGHTS = {"trained": "trained", "initial": "initial weights"}

NORMS = (
    ("hidden_norm_ratio", None, "Size of the first position over the mean of the others"),
    ("kurtosis", "kurtosis_without_first", "Kurtosis of the hidden states"),
    ("top1_over_median", "top1_over_median_without_first", "Largest activation over the median"),
    ("max_abs", "max_abs_without_first", "Largest activation"),
)


def metric_figures(results: Results) -> list[Figure]:
    """The sink metric by position, trained and as initialised; a star is a sink of the model's own.

    So is a null slot, at -1.
    """
    rows = Source.of(results, "sink_metric")
    looks = model_looks(results)
    figures = []
    for (eps, seq_len), of_kind in rows.by(lambda row: (row["eps"], row["seq_len"])).items():
        traces = []
        for (model, weights), group in of_kind.by(lambda row: (row["model"], row["weights"])).items():
            look, is_open = looks[model], "-open" * (weights == "initial")
            symbols = [
                ("star" if row["is_sink"] or is_null(row) else look.symbol) + is_open for row in group.rows
            ]
            more: Spec = {
                "marker": {"symbol": symbols, "size": 9},
                "line": {"dash": "dot" if is_open else look.dash, "width": 1.2},
            }
            name = f"{model}, {WEIGHTS[weights]}"
            traces.append(points(group, name, look, x="position", y="value", mode="lines+markers", **more))
        caption = f"Share of heads whose importance of a position exceeds {eps:g}, over {seq_len} tokens"
        places = of_kind.values("position")
        x = axis("position", dtick=1, range=[min(0, *places) - 0.4, max(places) + 0.4])
        y = axis("share of heads", range=[-0.03, 1.03], tickformat=".0%")
        figures.append(Figure(f"sink-metric/{eps:g}/{seq_len}", caption, traces, layout(x, y)))
    return figures


def norm_figures(results: Results) -> list[Figure]:
    """Sizes by layer, with and without the first position; untrained weights in grey."""
    drawn = drawn_models(results)
    rows = Source.of(results, "norms").where(lambda row: row["model"] in drawn)
    looks = model_looks(results)
    figures = []
    for field, field_without, caption in NORMS if rows else ():
        traces = []
        for (model, weights), group in rows.by(lambda row: (row["model"], row["weights"])).items():
            by_layer = group.ordered(lambda row: row["layer"])
            look = looks[model]
            fields: Spec = {"x": "layer", "mode": "lines+markers"}
            if weights == "initial":
                grey = Look(SOFT, look.symbol, "dot")
                traces.append(points(by_layer, f"{model}, {WEIGHTS[weights]}", grey, y=field, **fields))
                continue
            traces.append(points(by_layer, model, look, y=field, **fields))
            if field_without:
                hollow = Look(look.colour, f"{look.symbol}-open", "dash")
                name = f"{model}, without the first"
                traces.append(points(by_layer, name, hollow, y=field_without, **fields))
        y = log_axis("", traces, "y", tickformat="~r")
        x = axis("layer (0: after the embedding)", dtick=1 + max(rows.values("layer")) // 10)
        figures.append(Figure(f"norms/{field}", caption, traces, layout(x, y, 280)))
    return figures
