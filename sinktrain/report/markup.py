"""Pieces of the page as HTML: text, tables, plots with their numbers below."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from sinktrain.report.figures.look import Spec
from sinktrain.report.figures.numbers import figure_table
from sinktrain.report.figures.spec import Figure
from sinktrain.report.table import Table
from sinktrain.report.wording import printable


def html_text(text: str) -> str:
    """Plain text as HTML, safe in elements and attributes."""
    return escape(printable(text))


def soft(text: str) -> str:
    """A quiet paragraph."""
    return f'<p class="soft">{html_text(text)}</p>'


def bullets(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html_text(sentence)}</li>' for sentence in sentences)}</ul>"


def closed(summary: str, *content: str, is_open: bool = False) -> str:
    """Content behind a line that opens and closes it."""
    opening = "<details open>" if is_open else "<details>"
    return f"{opening}<summary>{html_text(summary)}</summary>{''.join(content)}</details>"


def table_html(table: Table, label: str, cells: Sequence[Sequence[str]] | None = None) -> str:
    """A table that scrolls by itself on narrow screens; what follows a ``±`` stands below.

    Args:
        label: what the table holds, read out to those who cannot see it.
        cells: HTML to show in place of the table's own plain cells.
    """
    numeric = [column > 0 and table.is_numeric(column) for column in range(len(table.header))]
    is_all_numeric = all(numeric[1:])  # said once then: long tables take much of the page
    kinds = [' class="number"' if is_number and not is_all_numeric else "" for is_number in numeric]
    opening = '<table class="numbers">' if is_all_numeric else "<table>"
    head = "".join(
        f'<th scope="col"{kind}>{html_text(name)}</th>'
        for kind, name in zip(kinds, table.header, strict=True)
    )
    rows = cells if cells is not None else [list(map(_cell, row)) for row in table.rows]
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
        + "</tr>"
        for first, *others in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html_text(label)}">'
        f"{opening}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    value, _, half = html_text(text).partition(" ± ")
    return f"{value}<small>± {half}</small>" if half else value


def plots(figures: Sequence[Figure]) -> str:
    """Plots side by side where there is room."""
    return f'<div class="plots">{"".join(map(_plot, figures))}</div>' if figures else ""


def _plot(figure: Figure) -> str:
    """A place for page.js to draw in, the plot's data, and its numbers as a table."""
    caption = html_text(figure.caption)
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="plot" role="img" aria-label="{caption}"></div>'
        f"{data_script('data-figure', figure.name, figure.spec())}"
        f"{closed('Numbers', table_html(figure_table(figure), f'Numbers of: {figure.caption}'))}</figure>"
    )


def data_script(kind: str, name: str, value: Spec) -> str:
    """Values for page.js; nothing in them can end the element."""
    data = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = data.replace("<", "\\u003c")
    return f'<script type="application/json" {kind}="{html_text(name)}">{data}</script>'
