"""The picture of a model card: losses by layout with their intervals, as a small SVG without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import unescape

from sinktrain.report import findings
from sinktrain.report.figures.look import Spec, coloured
from sinktrain.report.figures.losses import loss_figures
from sinktrain.report.figures.spec import Figure
from sinktrain.report.markup import html_text
from sinktrain.report.style import LIGHT
from sinktrain.report.wording import Results

WIDTH, LEFT, RIGHT = 760, 118, 24
HEAD, FOOT, LEGEND_ROW = 34, 48, 20
ROW_GAP, SERIES_GAP = 10, 12
SIZE = 4.5
"""All in CSS pixels: the picture and its margins, what stands above and below a panel, half a symbol."""

_FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif\" font-size=\"13\""


def streaming_picture(results: Results) -> str | None:
    """A panel for each text: a row for each layout, a mark for each model; None without any rows.

    ``dense`` is left out: far from the rest as it mostly is, it would crowd all others into a corner.

    Every mark is a ``<g>`` that names its ``data-model`` and ``data-layout``; its place on the axis is its
    loss (bits per byte where tokenizers differ), its line the interval.
    """
    bounded = {**results, "perplexity": [row for row in results["perplexity"] if row["policy"] != "dense"]}
    figures = [figure for text in findings.texts(bounded) for figure in loss_figures(bounded, text)]
    if not figures:
        return None
    markers = {trace["name"]: trace["marker"] for figure in figures for trace in figure.traces}
    top = LEGEND_ROW * len(markers) + 16
    panels = []
    for figure in figures:
        height = _height(figure)
        panels.append(f'<g transform="translate(0 {top})">{"".join(_panel(figure))}</g>')
        top += HEAD + height + FOOT
    legend = "".join(_legend(markers))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" '
        f'height="{top}" role="img" {_FONT} fill="{LIGHT["ink"]}">'
        f"<title>{html_text('; '.join(figure.caption for figure in figures))}</title>"
        f'<rect width="{WIDTH}" height="{top}" rx="6" fill="{LIGHT["paper"]}"/>{legend}'
        f"{''.join(panels)}</svg>\n"
    )


def _height(figure: Figure) -> int:
    return len(_words(figure)) * (ROW_GAP + SERIES_GAP * len(figure.traces))


def _words(figure: Figure) -> list[str]:
    return list(figure.layout["yaxis"]["categoryarray"])


def _legend(markers: dict[str, Spec]) -> Iterator[str]:
    for place, (name, marker) in enumerate(markers.items()):
        y = 20 + LEGEND_ROW * place
        yield _symbol(marker, LEFT + 6, y)
        yield f'<text x="{LEFT + 20}" y="{y + 4.5}">{html_text(unescape(name))}</text>'


def _panel(figure: Figure) -> Iterator[str]:
    words, height = _words(figure), _height(figure)
    low, high = map(float, figure.layout["xaxis"]["range"])

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    yield f'<text x="{LEFT}" y="20" fill="{LIGHT["soft"]}">{html_text(figure.caption)}</text>'
    yield from _axis(figure, across, height)
    row_height = height / len(words)
    for place, word in enumerate(words):
        y = HEAD + (place + 0.5) * row_height
        yield f'<text x="{LEFT - 12}" y="{y + 4.5:.1f}" text-anchor="end">{html_text(word)}</text>'
    for series, trace in enumerate(figure.traces):
        drop = (series + 1) * SERIES_GAP + ROW_GAP / 2 - SERIES_GAP / 2
        tops = {word: HEAD + place * row_height + drop for place, word in enumerate(words)}
        yield from _marks(trace, across, tops)


def _axis(figure: Figure, across: Callable[[float], float], height: int) -> Iterator[str]:
    bottom = HEAD + height
    for value, label in ticks(*figure.layout["xaxis"]["range"]):
        x = across(value)
        yield f'<line x1="{x:.2f}" y1="{HEAD}" x2="{x:.2f}" y2="{bottom}" stroke="{LIGHT["hair"]}"/>'
        yield f'<text class="tick" x="{x:.2f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
    title = html_text(figure.layout["xaxis"]["title"]["text"])
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield (
        f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}" stroke="{LIGHT["soft"]}"/>'
        f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle" fill="{LIGHT["soft"]}">{title}</text>'
    )


def _marks(trace: Spec, across: Callable[[float], float], tops: dict[str, float]) -> Iterator[str]:
    ends = trace.get("customdata") or [None] * len(trace["x"])
    for value, word, interval in zip(trace["x"], trace["y"], ends, strict=True):
        x, y = across(value), tops[word]
        whisker = ""
        if interval is not None:
            left, right = map(across, interval)
            whisker = (
                f'<path class="interval" d="M{left:.2f} {y:.1f}H{right:.2f}" '
                f'stroke="{_colour(trace["marker"])}" stroke-width="1.6"/>'
            )
        name = html_text(unescape(trace["name"]))
        yield (
            f'<g class="mark" data-model="{name}" data-layout="{html_text(word)}" data-x="{x:.2f}">'
            f"<title>{name}, {html_text(word)}: {value:.5g}</title>"
            f"{whisker}{_symbol(trace['marker'], x, y)}</g>"
        )


def _symbol(marker: Spec, x: float, y: float) -> str:
    """The report's symbols, so that models are told apart without colour."""
    r = SIZE
    shapes = {
        "circle": f'<circle cx="{x:.2f}" cy="{y:.1f}" r="{r}" fill="{_colour(marker)}"/>',
        "square": _path(f"M{x - r:.2f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z", marker),
        "diamond": _path(
            f"M{x:.2f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z", marker
        ),
        "triangle-up": _path(f"M{x:.2f} {y - r - 1:.1f}l{r + 1} {2 * r}h{-2 * r - 2}z", marker),
    }
    return shapes[marker["symbol"]]


def _path(d: str, marker: Spec) -> str:
    return f'<path d="{d}" fill="{_colour(marker)}"/>'


def _colour(marker: Spec) -> str:
    return str(coloured(marker["color"], LIGHT))


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers of a range, at most eleven, and as text."""
    power = 10.0 ** math.floor(math.log10((high - low) / 10))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 10)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [(number * step, f"{number * step:.{places}f}") for number in range(first, last + 1)]
