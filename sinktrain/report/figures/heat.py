"""Heat maps, layer x head: where attention goes, and how large the first value vector is."""

from __future__ import annotations

from sinktrain.report.figures.inside import WEIGHTS
from sinktrain.report.figures.look import Spec
from sinktrain.report.figures.source import Source, field_value
from sinktrain.report.figures.spec import Figure, axis, layout
from sinktrain.report.probe_tables import is_proxy
from sinktrain.report.wording import Results, Row


def heat_figures(results: Results, model: Row) -> list[Figure]:
    """The maps of one model, each with the trained weights beside the initial ones."""
    rows = Source.of(results, "sink_attention").where(lambda row: row["model"] == model["name"])
    if not rows:
        return []
    has_sink = all(row["sink_mass"] is not None for row in rows.rows)
    shares = {"sink_mass": "attention on its own sink"} if has_sink else {"mass.0": "attention on position 0"}
    if has_sink and model["sink"]["count"] < len(rows.rows[0]["mass"]):
        shares[f"mass.{model['sink']['count']}"] = "attention on the first text token"
    if any(row["null_mass"] > 0 for row in rows.rows):
        shares["null_mass"] = (
            "null mass*, a proxy: 1 - the mean of what its output is multiplied by"
            if any(map(is_proxy, rows.rows))
            else "attention on the null slot (null mass)"
        )
    shares["top_mass.0"] = "attention on the strongest position anywhere"
    maps = [(field, words, _SHARES) for field, words in shares.items()]
    maps += [("value_norm_ratio", "size of the value at position 0 over the mean", _RATIOS)]
    return [_heat_map(rows, field, model["name"], words, colours) for field, words, colours in maps]


def _colours(kind: str, power: int = 1) -> list[list[object]]:
    return [[(step / 4) ** power, f"var(--{kind}{step})"] for step in range(5)]


# the lightness of a share goes with its root: 2% and 10% can be told apart, and 100% is not beyond the scale
_SHARES: Spec = {"cmin": 0, "cmax": 1, "colorscale": _colours("h", 2), "colorbar": {"tickformat": ".0%"}}
_RATIOS: Spec = {
    "cmin": 0,
    "cmax": 2,
    "colorscale": _colours("d"),
    "colorbar": {"tickvals": [0, 0.5, 1, 1.5, 2], "ticktext": ["0", "0.5", "1", "1.5", "≥ 2"]},
}


def _heat_map(rows: Source, field: str, model: str, words: str, colours: Spec) -> Figure:
    """One panel for each kind of weights, side by side, in one scale of colours."""
    layers, heads = (range(max(rows.values(name)) + 1) for name in ("layer", "head"))
    panels = rows.by(lambda row: row["weights"])
    traces, titles = [], []
    axes: Spec = {}
    for panel, (weights, group) in enumerate(panels.items()):
        suffix = str(panel + 1) if panel else ""
        traces.append(_cells(group, field, layers, heads, WEIGHTS[weights], suffix))
        domain = [(panel + 0.05 * bool(panel)) / len(panels), (panel + 0.95) / len(panels)]
        plain = {"showgrid": False, "ticks": "", "tickformat": "d"}
        axes[f"xaxis{suffix}"] = axis("head", domain=domain, dtick=_step(heads), **plain)
        own = {"title": {"text": ""}, "showticklabels": False} if panel else {}
        axes[f"yaxis{suffix}"] = axis("layer", dtick=_step(layers), anchor=f"x{suffix}", **plain) | own
        where = {"xref": f"x{suffix} domain", "yref": "paper", "x": 0, "y": 1}
        titles.append({"text": WEIGHTS[weights], "xanchor": "left", "yanchor": "bottom", **where})
    height = 80 + max(110, min(340, 16 * len(layers)))
    more = {"coloraxis": colours, "annotations": titles, "showlegend": False}
    frame = layout(axes.pop("xaxis"), axes.pop("yaxis"), height, **axes, **more)
    return Figure(f"heat/{model}/{field}", f"{model}: {words}", traces, frame)


def _cells(group: Source, field: str, layers: range, heads: range, name: str, suffix: str) -> Spec:
    """One panel; its rows are named in the order of the cells, and a head not measured stays empty."""
    found = {
        (row["layer"], row["head"]): (number, row)
        for number, row in zip(group.numbers, group.rows, strict=True)
    }
    grid = [[found.get((layer, head)) for head in heads] for layer in layers]
    trace: Spec = {
        "type": "heatmap",
        "name": name,
        "x": list(heads),
        "y": list(layers),
        "z": [[field_value(cell[1], field) if cell else None for cell in cells] for cells in grid],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "coloraxis": "coloraxis",
        "hovertemplate": "layer %{y}, head %{x}: %{z:.4~g}<extra>%{fullData.name}</extra>",
        "meta": {
            "list": group.list_name,
            "rows": [cell[0] for cells in grid for cell in cells if cell],
            "x": "head",
            "y": "layer",
            "z": field,
        },
    }
    if field == "top_mass.0":
        trace["customdata"] = [
            [field_value(cell[1], "top_positions.0") if cell else None for cell in cells] for cells in grid
        ]
        trace["meta"]["customdata"] = "top_positions.0"
        trace["hovertemplate"] = trace["hovertemplate"].replace(
            "<extra>", " on position %{customdata}<extra>"
        )
    return trace


def _step(values: range) -> int:
    """Distance of the axis's numbers, so that a telephone has room for them."""
    return 1 if len(values) <= 6 else 2 if len(values) <= 12 else 4
