"""The numbers of a plot as a table, for those without scripts, without sight, or in want of exact figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import unescape

from sinktrain.report.figures.look import Spec
from sinktrain.report.figures.spec import Figure
from sinktrain.report.table import Table


def figure_table(figure: Figure) -> Table:
    """Every number that the plot shows, to five digits."""
    if figure.traces[0]["type"] == "heatmap":
        return _cells(figure.traces)
    x, y = (figure.layout[f"{axis}axis"]["title"]["text"] for axis in "xy")
    is_shared = all(trace["x"] == figure.traces[0]["x"] for trace in figure.traces)
    if is_shared and not any("customdata" in trace for trace in figure.traces):
        return _side_by_side(figure.traces, x)
    return _one_below_another(figure.traces, x, y or "value")


def _cells(traces: Sequence[Spec]) -> Table:
    """A row for each layer, a column for each head."""
    heads = traces[0]["x"]
    return Table(
        ["weights, layer", *(f"head {head}" for head in heads)],
        [
            [f"{trace['name']}, {layer}", *map(_number, cells)]
            for trace in traces
            for layer, cells in zip(trace["y"], trace["z"], strict=True)
        ],
    )


def _side_by_side(traces: Sequence[Spec], x: str) -> Table:
    return Table(
        [x, *(unescape(trace["name"]) for trace in traces)],
        [
            [_number(at), *(_number(trace["y"][row]) for trace in traces)]
            for row, at in enumerate(traces[0]["x"])
        ],
    )


def _one_below_another(traces: Sequence[Spec], x: str, y: str) -> Table:
    """A row for each point, with the ends of its whisker; words before values, whichever axis has them."""
    has_words = any(isinstance(place, str) for trace in traces for place in trace["y"])
    first, second = ("y", "x") if has_words else ("x", "y")
    rows = [
        [unescape(trace["name"]), _number(at), _number(value), " to ".join(map(_number, ends))]
        for trace in traces
        for at, value, ends in zip(
            trace[first], trace[second], trace.get("customdata", [[]] * len(trace["x"])), strict=True
        )
    ]
    return Table(["series", *(("layout", x) if has_words else (x, y)), "whisker"], rows)


def _number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
