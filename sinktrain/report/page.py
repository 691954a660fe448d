"""The report as one page of HTML that opens offline: findings first, then tables, pictures and limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sinktrain.report import findings, tables
from sinktrain.report.charts import (
    Line,
    Whisker,
    html_text,
    legend_sample,
    line_chart,
    padded_range,
    whisker_chart,
)
from sinktrain.report.findings import Results, Row
from sinktrain.report.style import STYLE
from sinktrain.report.tables import Table

WORDS = {
    "sink": "A token at the front of every stream that attention can rest on. A sink model was trained with "
    "a placeholder that means nothing else; a vanilla model may come to use its first tokens so.",
    "layout": "What a stream keeps: 1+127 is 1 sink slot that is never reused and a window of 127.",
    "window": "The newest other tokens kept, the current one included. Older ones are evicted.",
    "dense": "Nothing is evicted: every token sees all before it.",
    "nats": "The unit of loss, the mean of -ln(probability given to the token that came). "
    "One nat is 1.44 bits; 0.01 nats are about one per cent of perplexity.",
    "stream position": "How many tokens, sinks included, came before this one in the stream.",
    "95% interval": "From a bootstrap over blocks of neighbouring tokens: figures from as much other text of "
    "this kind would fall there about 95 times in 100.",
}

DIFFERENCE_SERIES = 1


def report_page(results: Results) -> str:
    """The page for the dict of ``results.json``: self-contained, without scripts or addresses.

    Lists that are empty draw nothing. Every name from the results is escaped.
    """
    title = "Streaming: " + ", ".join(model["name"] for model in results["models"])
    body = "\n".join(
        [
            f"<header><h1>{html_text(title)}</h1>",
            *(f'<p class="finding">{html_text(sentence)}</p>' for sentence in findings.headline(results)),
            "</header>",
            *(_text_section(results, text) for text in findings.texts(results)),
            _reading_section(results),
            _settings_section(results),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text_section(results: Results, text: str) -> str:
    scored = [row for row in results["perplexity"] if row["text"] == text]
    pairs = [pair for pair in results["paired"] if pair["text"] == text]
    lines = [row for row in results["position_loss"] if row["text"] == text and row["stream_pos"]]
    return "\n".join(
        [
            f"<section><h2>Perplexity on {html_text(text)}</h2>",
            f'<p class="soft">{findings.tokens_scored(scored)}. Below each perplexity, '
            "the 95% interval of the loss in nats.</p>",
            _perplexity_table(results, text),
            '<div class="charts">',
            _loss_figure(scored, text),
            _difference_figure(pairs, text) if pairs else "",
            "</div>",
            _difference_section(results, text) if pairs else "",
            _position_section(lines, text) if lines else "",
            "<details><summary>All measurements</summary>",
            _table(tables.measurement_table(results, text), f"All measurements on {text}"),
            "</details></section>",
        ]
    )


def _perplexity_table(results: Results, text: str) -> str:
    upper = tables.perplexity_cells(results, text, tables.perplexity_cell)
    lower = tables.perplexity_cells(
        results, text, lambda row: findings.loss_interval_text(row, joiner="\N{EN DASH}")
    )
    cells = [
        [html_text(above[0]), *(f"{a}<small>{b}</small>" for a, b in zip(above[1:], below[1:], strict=True))]
        for above, below in zip(upper.rows, lower.rows, strict=True)
    ]
    return _table(upper, f"Perplexity on {text} by model and layout", cells)


def _loss_figure(rows: Sequence[Row], text: str) -> str:
    layouts = findings.layout_names(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    whiskers = [
        Whisker(
            group=row["model"],
            label=findings.layout_name(row),
            value=f"{row['loss_nats']:.{findings.digits(*row['ci95'])}f}",
            series=layouts.index(findings.layout_name(row)),
            mean=row["loss_nats"],
            low=row["ci95"][0],
            high=row["ci95"][1],
        )
        for model in models
        for layout in layouts
        for row in rows
        if row["model"] == model and findings.layout_name(row) == layout
    ]
    chart = whisker_chart(whiskers, "loss, nats", f"Loss by model and layout on {text}, with 95% intervals")
    return _figure("Loss by model and layout; lines are 95% intervals over text", chart)


def _difference_figure(pairs: Sequence[Row], text: str) -> str:
    whiskers = [
        Whisker(
            *findings.pair_words(pair),
            findings.delta_text(pair),
            DIFFERENCE_SERIES,
            pair["delta_nats"],
            *pair["ci95"],
        )
        for group in dict.fromkeys(findings.pair_words(pair)[0] for pair in pairs)
        for pair in pairs
        if findings.pair_words(pair)[0] == group
    ]
    chart = whisker_chart(
        whiskers,
        "difference in loss, nats",
        f"Paired differences in loss on {text}, with 95% intervals",
        has_zero=True,
    )
    return _figure("Differences in loss, paired by token; left of zero the first is better", chart)


def _difference_section(results: Results, text: str) -> str:
    return (
        "<h3>Differences in loss</h3>"
        '<p class="soft">Token by token on the same text; below zero, the first is better.</p>'
        + _table(tables.difference_table(results, text), f"Paired differences in loss on {text}")
    )


def _position_section(rows: Sequence[Row], text: str) -> str:
    layouts = findings.layout_names(rows)
    lengths = sorted({row["sinks"] + row["window"] for row in rows if row["policy"] == "streaming"})
    marks = [(float(length), f"eviction from {length:,}") for length in lengths]
    y_range = padded_range([loss for row in rows for loss in row["loss_nats"]])
    figures = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = [
            Line(layouts.index(findings.layout_name(row)), row["stream_pos"], row["loss_nats"])
            for row in rows
            if row["model"] == model
        ]
        description = f"Loss of {model} by stream position on {text}, one line per layout"
        figures.append(_figure(model, line_chart(lines, y_range, marks, description)))
    key = "".join(f"<li>{legend_sample(series)}{layout}</li>" for series, layout in enumerate(layouts))
    return (
        "<h3>Loss by stream position</h3>"
        '<p class="soft">Means over bins of positions; all models on the same scale. What all lines share '
        "is the difficulty of the text; what tells is the distance between lines.</p>"
        f'<ul class="legend">{key}</ul><div class="charts">{"".join(figures)}</div>'
    )


def _reading_section(results: Results) -> str:
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in WORDS.items())
    limits = findings.limits(results)
    return (
        f"<section><h2>How to read it</h2><p>{' '.join(findings.READING)}</p>"
        f"{_list('Limits', limits) if limits else ''}<h3>Words</h3><dl>{words}</dl></section>"
    )


def _list(heading: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{html_text(sentence)}</li>" for sentence in sentences)
    return f"<h3>{heading}</h3><ul>{items}</ul>"


def _settings_section(results: Results) -> str:
    environment = tables.environment_table(results)
    return (
        "<section><h2>Models and environment</h2>"
        + _table(tables.model_table(results), "Models")
        + (_table(environment, "Environment") if environment.rows else "")
        + "</section>"
    )


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{html_text(caption)}</figcaption>{chart}</figure>"


def _table(table: Table, label: str, cells: Sequence[Sequence[str]] | None = None) -> str:
    """A table that scrolls by itself on narrow screens.

    Args:
        label: what the table holds, read out to those who cannot see it.
        cells: HTML to show in place of the table's own plain cells.
    """
    kinds = [
        ' class="number"' if column and table.is_numeric(column) else ""
        for column in range(len(table.header))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{html_text(name)}</th>'
        for kind, name in zip(kinds, table.header, strict=True)
    )
    rows = cells if cells is not None else [[html_text(cell) for cell in row] for row in table.rows]
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
        + "</tr>"
        for first, *others in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html_text(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
