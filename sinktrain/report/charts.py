"""Small charts as inline SVG: lines over stream position, and dots with whiskers.

Coordinates are those of a 360-wide view box, about the width of a telephone, so that text stays readable
there and grows on wider screens. Colours come from the page's style: class ``s0``, ``s1``, … is a series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sinktrain.report.findings import printable

NUM_SERIES_STYLES = 6
WIDTH = 360.0
MARGIN = 10.0

Range = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a line chart; ``series`` chooses its colour and dashes."""

    series: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Whisker:
    """One row of a whisker chart: a dot at ``mean`` on a line from ``low`` to ``high``."""

    group: str
    label: str
    value: str
    series: int
    mean: float
    low: float
    high: float


class Scale:
    """A straight map from values to coordinates."""

    def __init__(self, values: Range, coordinates: Range) -> None:
        self.origin, self.start = values[0], coordinates[0]
        self.slope = (coordinates[1] - coordinates[0]) / (values[1] - values[0])

    def __call__(self, value: float) -> float:
        return self.start + (value - self.origin) * self.slope


def html_text(text: str) -> str:
    """Plain text as HTML, safe in elements and attributes."""
    return escape(printable(text))


def padded_range(values: Sequence[float], share: float = 0.06) -> Range:
    """The range of some values and a little air on both sides."""
    low, high = min(values), max(values)
    air = (high - low) * share or max(abs(high), 1.0) * share
    return low - air, high + air


def line_chart(
    lines: Sequence[Line], y_range: Range, marks: Sequence[tuple[float, str]], description: str
) -> str:
    """Loss in nats by stream position, from 0 on.

    Args:
        y_range: loss at the bottom and the top, so that neighbouring charts can share it.
        marks: positions with a word, drawn as upright dashed lines.
        description: what the chart shows, for those who cannot see it.
    """
    left, right, top, bottom = 40.0, WIDTH - MARGIN, 30.0, 196.0
    x_range = (0.0, max(max(line.x) for line in lines))
    x = Scale(x_range, (left, right))
    y = Scale(y_range, (bottom, top))
    parts = [_text(left, 12, "loss, nats", "start")]
    for tick, label in _ticks(y_range):
        parts += [_rule("grid", left, y(tick), right, y(tick)), _text(left - 5, y(tick) + 4, label, "end")]
    for tick, label in _ticks(x_range, count=4):
        parts += [
            _rule("axis", x(tick), bottom, x(tick), bottom + 4),
            _text(x(tick), bottom + 17, label, "middle"),
        ]
    parts += [
        _rule("axis", left, bottom, right, bottom),
        _text(right, bottom + 34, "stream position, tokens", "end"),
    ]
    for position, word in marks:
        is_left = x(position) < (left + right) / 2
        anchor, aside = ("start", 4) if is_left else ("end", -4)
        parts += [_rule("mark", x(position), top - 8, x(position), bottom)]
        parts += [_text(x(position) + aside, top - 4, word, anchor)]
    for line in lines:
        points = " ".join(f"{x(at):.1f},{y(loss):.1f}" for at, loss in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline class="line {series_class(line.series)}" points="{points}"/>')
    return _svg(bottom + 42, description, parts)


def whisker_chart(whiskers: Sequence[Whisker], axis: str, description: str, has_zero: bool = False) -> str:
    """Means with their intervals, one row each, under the heading of their group.

    Args:
        axis: what the horizontal axis measures, with its unit.
        description: what the chart shows, for those who cannot see it.
        has_zero: whether zero is on the axis, with a line through it.
    """
    row_height, letter_width = 20.0, 7.0
    left = 16 + letter_width * max(len(whisker.label) for whisker in whiskers)
    right = WIDTH - 12 - letter_width * max(len(whisker.value) for whisker in whiskers)
    ends = [end for whisker in whiskers for end in (whisker.low, whisker.high)]
    x_range = padded_range([*ends, 0.0] if has_zero else ends)
    x = Scale(x_range, (left, right))
    height, group, rows = 4.0, None, []
    for whisker in whiskers:
        if whisker.group != group:
            group = whisker.group
            height += row_height + 4
            rows.append(_text(0, height - 4, _shortened(group), "start", "group"))
        height += row_height
        rows += _whisker_row(whisker, x, height - row_height / 2)
    parts = []
    for tick, label in _ticks(x_range):
        parts += [
            _rule("grid", x(tick), 8, x(tick), height + 4),
            _text(x(tick), height + 17, label, "middle"),
        ]
    if has_zero:
        parts.append(_rule("mark", x(0), 8, x(0), height + 4))
    parts.append(_text(right, height + 34, axis, "end"))
    return _svg(height + 42, description, parts + rows)


def _whisker_row(whisker: Whisker, x: Scale, y: float) -> list[str]:
    style = series_class(whisker.series)
    return [
        _text(12, y + 4, whisker.label, "start"),
        _rule(f"whisker {style}", x(whisker.low), y, x(whisker.high), y),
        f'<circle class="dot {style}" cx="{x(whisker.mean):.1f}" cy="{y:.1f}" r="4"/>',
        _text(WIDTH, y + 4, whisker.value, "end"),
    ]


def legend_sample(series: int) -> str:
    """A short piece of a series' line, for a legend in the text."""
    return (
        '<svg class="sample" viewBox="0 0 28 10" aria-hidden="true">'
        f'<polyline class="line {series_class(series)}" points="0,5 28,5"/></svg>'
    )


def series_class(series: int) -> str:
    return f"s{series % NUM_SERIES_STYLES}"


def _ticks(values: Range, count: int = 5) -> list[tuple[float, str]]:
    """About ``count`` round values within a range, with their labels."""
    rough = (values[1] - values[0]) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(values[0] / step - 1e-9), math.floor(values[1] / step + 1e-9)
    return [(n * step, f"{n * step:z,.{places}f}") for n in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html_text(text)}</text>'


def _rule(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _shortened(name: str, longest: int = 42) -> str:
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def _svg(height: float, description: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH:.0f} {height:.0f}"'
    return "\n".join([f'<svg {size} role="img" aria-label="{html_text(description)}">', *parts, "</svg>"])
