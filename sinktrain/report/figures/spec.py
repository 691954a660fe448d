"""What a plot is made of: plotly's traces and axes as plain dicts.

Every trace says in ``meta`` from which rows of the results its numbers come: ``list``, ``rows`` (places in
that list), and the fields that ``x``, ``y``, ``z``, ``low`` and ``high`` show, null for what is no number of
the results. ``sign`` is -1 where a difference is shown the other way round. Dotted marks do the same in
``layout.meta``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from sinktrain.report.figures.look import Look, Spec
from sinktrain.report.figures.source import Source, field_value
from sinktrain.report.wording import printable

LABEL_ROOM = 1.25  # how far, as a ratio, marks with numbers stand from one another
ROW_HEIGHT, WHISKER_HEIGHT, FRAME_HEIGHT = 24, 13, 90  # CSS pixels


@dataclass(frozen=True)
class Figure:
    """One plot with its caption; no other plot of a report has its ``name``."""

    name: str
    caption: str
    traces: Sequence[Spec]
    layout: Spec = field(default_factory=dict)

    def spec(self) -> Spec:
        """What ``Plotly.newPlot`` takes, but for the template."""
        return {"data": list(self.traces), "layout": self.layout}


def shown(name: str, longest: int = 40) -> str:
    """A name as plotly shows it as it stands: its text is a kind of HTML; long ones lose their middle."""
    name, half = printable(name), longest // 2
    return escape(name if len(name) <= longest else f"{name[:half]}…{name[-half:]}", quote=False)


def points(
    source: Source,
    name: str,
    look: Look,
    *,
    y: str,
    x: str | None = None,
    places: Sequence[str] | None = None,
    low: str | None = None,
    high: str | None = None,
    sign: int = 1,
    mode: str = "markers",
    unit: str = "",
    **more: Any,
) -> Spec:
    """A trace of ``y`` over ``x``, with whiskers from ``low`` to ``high``.

    Args:
        places: words for the vertical axis, one a value; the values of ``y`` then run horizontally.
        unit: what follows a value under the pointer.
        more: anything of plotly's, besides what is made here.
    """
    values = [sign * value for value in source.values(y)]
    across, along = ("x", "y") if places is None else ("y", "x")
    trace: Spec = {
        "type": "scatter",
        "mode": mode,
        "name": shown(name),
        across: source.values(x or "") if places is None else list(places),
        along: values,
        "meta": {"list": source.list_name, "rows": list(source.numbers), across: x, along: y, "sign": sign},
        "hovertemplate": f"%{{{across}}}: %{{{along}:.5~g}}{unit}<extra>%{{fullData.name}}</extra>",
    }
    if places is not None:
        trace["orientation"] = "h"  # the way that neighbours of a group give way
    if "markers" in mode:
        trace["marker"] = {"color": look.colour, "symbol": look.symbol}
    if "lines" in mode:
        trace["line"] = {"color": look.colour, "dash": look.dash}
    if low or high:
        ends = [source.values(end or y) for end in (low, high)]
        trace |= _whiskers(values, ends if sign > 0 else ends[::-1], along, sign, look)
        trace["meta"] |= {"low": low, "high": high}
        words = "<br>%{customdata[0]:.5~g} to %{customdata[1]:.5~g}<extra>"
        trace["hovertemplate"] = trace["hovertemplate"].replace("<extra>", words)
    return _merged(trace, more)


def _whiskers(
    values: Sequence[float], ends: Sequence[Sequence[float]], along: str, sign: int, look: Look
) -> Spec:
    """Error bars, and the ends themselves for the pointer."""
    lows, highs = ([sign * end for end in side] for side in ends)
    return {
        "customdata": [list(pair) for pair in zip(lows, highs, strict=True)],
        f"error_{along}": {
            "array": [high - value for high, value in zip(highs, values, strict=True)],
            "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
            "color": look.colour,
        },
    }


def marks(source: Source, place: str) -> Spec:
    """Dotted vertical lines at a field of some rows, each place once, with its number: parts of a layout."""
    once = dict(sorted(source.by(lambda row: field_value(row, place)).items(), reverse=True))
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1}
    label = {"textposition": "end", "textangle": 0, "xanchor": "left", "yanchor": "bottom"}
    shapes, last = [], math.inf
    for at in once:
        has_room = at * LABEL_ROOM < last
        last = at if has_room else last
        shapes.append({**line, "x0": at, "x1": at, "label": {**label, "text": f"{at:,}" if has_room else ""}})
    metas = [{"list": rows.list_name, "rows": list(rows.numbers), "x": place} for rows in once.values()]
    return {"shapes": shapes, "meta": {"shapes": metas}}


def axis(title: str = "", **more: Any) -> Spec:
    return {"title": {"text": title}, **more}


def log_axis(title: str, traces: Sequence[Spec], along: str, **more: Any) -> Spec:
    """A logarithmic axis with few labels: 1, 2, 5 of a power of ten, or powers only."""
    positive = [value for value in _values(traces, along) if value > 0] or [1.0]
    decades = math.log10(max(positive) / min(positive))
    ticks: Spec = {} if decades < 0.6 else {"dtick": "D2"} if decades < 3 else {"dtick": 1}
    return axis(title, type="log", **{"tickformat": "~s", **ticks, **more})


def words_axis(words: Sequence[str]) -> Spec:
    """A vertical axis of words, the first at the top."""
    ends = [len(words) - 0.5, -0.5]
    return axis("", type="category", categoryorder="array", categoryarray=list(words), range=ends, ticks="")


def padded(traces: Sequence[Spec], along: str, has_zero: bool = False) -> list[float]:
    """The range of all values and whiskers along ``x`` or ``y``, with a little air."""
    values = _values(traces, along)
    low, high = min(values + [0.0] * has_zero), max(values + [0.0] * has_zero)
    air = 0.05 * (high - low) or 0.05 * (abs(high) or 1.0)
    return [low - air, high + air]


def _values(traces: Sequence[Spec], along: str) -> list[float]:
    """All values along an axis, and the ends of whiskers that run along it."""
    values = [value for trace in traces for value in trace[along]]
    with_ends = [trace for trace in traces if f"error_{along}" in trace]
    return values + [end for trace in with_ends for ends in trace["customdata"] for end in ends]


def layout(x: Spec, y: Spec, height: int = 300, **more: Any) -> Spec:
    """Axes and a height.

    Args:
        height: of the plot with its axes, in CSS pixels; page.js adds what the legend takes.
    """
    return {"height": height, "xaxis": x, "yaxis": y, **more}


def whisker_layout(title: str, words: Sequence[str], traces: Sequence[Spec], has_zero: bool = False) -> Spec:
    """A row for each word, the series of a row below one another, values along the horizontal axis."""
    x = axis(title, range=padded(traces, "x", has_zero), **({"zeroline": True} if has_zero else {}))
    groups = {trace.get("offsetgroup") for trace in traces}
    height = FRAME_HEIGHT + len(words) * max(ROW_HEIGHT, WHISKER_HEIGHT * len(groups))
    return layout(x, words_axis(words), height, scattermode="group", scattergap=0.4)


def _merged(base: Spec, more: Mapping[str, Any]) -> Spec:
    """``more`` over ``base``; where both hold a dict, entry by entry."""
    merged = dict(base)
    for name, value in more.items():
        is_both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        merged[name] = _merged(base[name], value) if is_both else value
    return merged
