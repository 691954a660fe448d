"""What ``sinktrain compare`` prints: perplexities, differences, a line for all else, and the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from sinktrain.report import wording
from sinktrain.report.contests import main_pairs, own_rows
from sinktrain.report.findings import failures, has_one_tokenizer, texts, tokens_scored, verdict_sentences
from sinktrain.report.loss_tables import bits_cell, perplexity_cell, perplexity_cells
from sinktrain.report.probe_tables import is_null, is_proxy, null_mass_text, sink_rows, untrained
from sinktrain.report.table import COLUMN_GAP, Table
from sinktrain.report.wording import Results, Row, printable, ratio_text, share_text
from sinktrain.report.zero_shot_tables import zero_shot_lines

MOST_IN_A_LINE = 4
REMOVAL_TESTS = {"removed": "first tokens removed", "replaced": "kept tokens made line breaks"}


def terminal_table(results: Results, width: int = 100) -> str:
    """The whole comparison as plain text.

    Args:
        width: columns of the terminal; where layouts do not fit side by side they go on below.
    """
    parts = [_text_part(results, text, width) for text in texts(results)]
    lines = [
        *_telemetry_lines(results),
        *_removal_lines(results),
        *_quantized_lines(results),
        *_streameval_lines(results),
        *zero_shot_lines(results),
        *_latency_lines(results),
        *_verified_lines(results),
        *failures(results),
    ]
    if lines:
        parts.append("\n".join(_wrapped(line, width) for line in lines))
    if results["paired"]:
        parts += [_wrapped(sentence, width) for sentence in verdict_sentences(results)]
    return "\n\n".join(parts)


def _wrapped(line: str, width: int, indent: str = "") -> str:
    """A line as several, broken at spaces alone: names hold hyphens."""
    return textwrap.fill(
        line, width, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
    )


# -- losses -----------------------------------------------------------------------------------------


def _text_part(results: Results, text: str, width: int) -> str:
    scored = [row for row in results["perplexity"] if row["text"] == text]
    if has_one_tokenizer(results):
        quantity, below = "perplexity", "the 95% interval of the loss in nats"
        upper = perplexity_cells(results, text, perplexity_cell)
        lower = perplexity_cells(results, text, lambda row: wording.loss_interval_text(row, joiner="-"))
    else:
        quantity, below = "bits per byte, as tokenizers differ", "perplexities, which can't be compared"
        upper = perplexity_cells(results, text, bits_cell)
        lower = perplexity_cells(results, text, perplexity_cell)
    title = f"{printable(text)}: {quantity} ({tokens_scored(scored)}); below it {below}"
    lines = [_wrapped(title, width), "", *_banded(upper, lower, width)]
    pairs = main_pairs(results, text)
    if pairs:
        lines += ["", *_difference_lines(pairs, width)]
        others = sum(pair["text"] == text for pair in results["paired"]) - len(pairs)
        lines += [f"  {others} more differences in results.json"] * (others > 0)
    return "\n".join(lines)


def _banded(upper: Table, lower: Table, width: int) -> Iterator[str]:
    """Rows of two lines each, columns right-aligned, in as many bands as the width asks for."""
    name_width = max(len(row[0]) for row in (upper.header, *upper.rows))
    cells = [upper.header, *upper.rows, *lower.rows]
    cell_width = max(len(cell) for row in cells for cell in row[1:])
    per_band = max(1, (width - name_width) // (cell_width + len(COLUMN_GAP)))
    for first in range(1, len(upper.header), per_band):

        def line(name: str, row: list[str], first: int = first) -> str:
            band = row[first : first + per_band]
            return COLUMN_GAP.join([name.ljust(name_width), *(cell.rjust(cell_width) for cell in band)])

        if first > 1:
            yield ""
        yield line("model", upper.header)
        for above, below in zip(upper.rows, lower.rows, strict=True):
            yield line(above[0], above)
            yield line("", below)


def _difference_lines(pairs: Sequence[Row], width: int) -> Iterator[str]:
    """A small table, or sentences where it would be wider than the terminal."""
    kinds = list(dict.fromkeys(map(wording.over_text, pairs)))
    yield _wrapped(
        f"difference in loss, token by token, 95% intervals over {' or '.join(kinds)} "
        "(below zero: the first is better)",
        width,
    )
    rows = [
        [
            *wording.pair_words(pair),
            wording.delta_text(pair),
            wording.delta_interval_text(pair),
            *[wording.over_text(pair)] * (len(kinds) > 1),
            wording.verdict(pair).removesuffix(" is better") if wording.is_measurable(pair) else "none",
        ]
        for pair in pairs
    ]
    over = ["over"] * (len(kinds) > 1)
    rows.insert(0, ["difference", "layout", "nats", "95% interval", *over, "better"])
    for some in (rows, [row[:-1] for row in rows]):
        lines = list(_aligned(some))
        if max(map(len, lines)) <= width:
            yield from lines
            return
    for pair in pairs:
        yield _wrapped(wording.difference_words(pair), width, "  ")


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of a difference table; its numbers, in the third and fourth column, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(size) if column in (2, 3) else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {COLUMN_GAP.join(cells)}".rstrip()


# -- a line each ------------------------------------------------------------------------------------


def _few(parts: Sequence[str], joiner: str = ", ") -> str:
    """Some parts in full, and how many more there are."""
    more = [f"{len(parts) - MOST_IN_A_LINE} more in results.json"] * (len(parts) > MOST_IN_A_LINE)
    return joiner.join([*parts[:MOST_IN_A_LINE], *more])


def _telemetry_lines(results: Results) -> Iterator[str]:
    """The sink metric where each model should have its sink: its own, its null slot or its first token."""
    groups: dict[tuple[float, int], dict[str, Row]] = {}
    for row in sink_rows(results):
        groups.setdefault((row["eps"], row["seq_len"]), {}).setdefault(row["model"], row)
    for (eps, seq_len), by_model in groups.items():
        parts = []
        for row in by_model.values():
            initial = untrained(results["sink_metric"], row, ("eps", "seq_len", "position"))
            null = "" if initial is None else f" (untrained {share_text(initial['value'])})"
            place = " on its null slot" * is_null(row)
            parts.append(f"{printable(row['model'])} {share_text(row['value'])}{place}{null}")
        yield f"sink metric (heads above {eps:g}, {seq_len:,} tokens): {_few(parts)}"
    yield from _null_lines(results)


def _null_lines(results: Results) -> Iterator[str]:
    """The attention that no token gets, of the models that have such, or a proxy of it."""
    heads: dict[str, dict[str, list[Row]]] = {}
    for head in results["sink_attention"]:
        heads.setdefault(head["model"], {}).setdefault(head["weights"], []).append(head)
    parts = []
    for model, of_weights in heads.items():
        texts = {weights: null_mass_text(some) for weights, some in of_weights.items()}
        if texts.get("trained", "0%") != "0%":
            initial = f" (untrained {texts['initial']})" if "initial" in texts else ""
            parts.append(f"{printable(model)} {texts['trained']}{initial}")
    if parts:
        note = "; *: a proxy, 1 - the mean factor of outputs" * any(map(is_proxy, results["sink_attention"]))
        yield f"null mass (attention on no token{note}): {_few(parts)}"


def _removal_lines(results: Results) -> Iterator[str]:
    """What taking the first tokens away costs, and what giving them no meaning costs."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in own_rows(results, results["removal"]):
        groups.setdefault((row["text"], row["test"]), []).append(row)
    for (text, test), rows in groups.items():
        name = f"{printable(text)}, " if len(texts(results)) > 1 else ""
        parts = [
            f"{printable(row['model'])} {wording.layout_name(row)} {wording.delta_text(row)} "
            f"({wording.delta_interval_text(row)})"
            for row in rows
        ]
        yield f"{name}{REMOVAL_TESTS[test]}, nats: {_few(parts)}"


def _quantized_lines(results: Results) -> Iterator[str]:
    """What rounding costs each model under streaming, with the sink's slots like all others and apart."""
    groups: dict[tuple[str, str], dict[str, dict[bool, Row]]] = {}
    for row in results["quantized"]:
        is_apart = row["sink_in_full_precision"]
        if row["policy"] == "streaming" and row["sink_in_statistics"] in (None, not is_apart):
            group = groups.setdefault((row["text"], row["scheme"]), {})
            group.setdefault(row["model"], {})[is_apart] = row
    for (text, scheme), by_model in groups.items():
        name = f"{printable(text)}, " if len(texts(results)) > 1 else ""
        parts = [
            f"{printable(model)} {wording.delta_text(rows[False])} ({wording.delta_text(rows[True])})"
            for model, rows in by_model.items()
        ]
        yield f"{name}quantised {printable(scheme)}, nats (with the sink's slots apart): {_few(parts)}"


def _streameval_lines(results: Results) -> Iterator[str]:
    """Each task by each model's own layout: the nearest answers and the farthest."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in own_rows(results, results["streameval"]):
        if row["policy"] == "streaming":
            groups.setdefault(row["task"], {}).setdefault(row["model"], []).append(row)
    for task, by_model in groups.items():
        parts = [_answer_words(rows) for rows in by_model.values()]
        chance = next(iter(by_model.values()))[0]["chance"]
        yield f"{task} (chance {share_text(chance)}): {_few(parts, '; ')}"


def _answer_words(rows: Sequence[Row]) -> str:
    """``sink 1+63 84% at 10 tokens back, 25% at 152``."""
    rows = sorted(rows, key=lambda row: float(row["distance_tokens"]))
    near, far = rows[0], rows[-1]
    first = (
        f"{printable(near['model'])} {wording.layout_name(near)} {share_text(near['accuracy'])} "
        f"at {near['distance_tokens']:,.0f} tokens back"
    )
    if far is near:
        return first
    return f"{first}, {share_text(far['accuracy'])} at {far['distance_tokens']:,.0f}"


def _latency_lines(results: Results) -> Iterator[str]:
    """Milliseconds a token at the end of the longest stream."""
    end = max((row["stream_pos"] for row in results["latency"]), default=0)
    by_model: dict[str, list[str]] = {}
    for row in own_rows(results, results["latency"]):
        if row["stream_pos"] == end:
            batch = f" x{row['batch']}" if row["batch"] > 1 else ""
            by_model.setdefault(row["model"], []).append(
                f"{wording.layout_name(row)}{batch} {ratio_text(row['ms_per_token_p50'])}"
            )
    if by_model:
        parts = [f"{printable(model)} {_few(layouts)}" for model, layouts in by_model.items()]
        yield f"ms a token at {end:,}: {_few(parts, '; ')}"


def _verified_lines(results: Results) -> Iterator[str]:
    """The worst of all checks of blockwise evaluation against the decoder, for each dtype."""
    by_dtype: dict[str, list[Row]] = {}
    for row in results["verified"]:
        by_dtype.setdefault(row["dtype"], []).append(row)
    for dtype, rows in by_dtype.items():
        worst = max(rows, key=lambda row: float(row["max_logit_diff"]))
        where = (
            f"{printable(worst['model'])}, {worst['sinks']}+{worst['window']}, {worst['num_tokens']:,} tokens"
        )
        yield (
            f"blockwise against token by token, {dtype}: largest logit difference "
            f"{worst['max_logit_diff']:.1e} ({where}; {wording.counted(len(rows), 'check')})"
        )
