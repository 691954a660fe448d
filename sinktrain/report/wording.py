"""Numbers, layouts and differences in words, with as many digits as they carry.

``results`` is everywhere the dict of ``results.json``; rounding happens here and in no file before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Row = Mapping[str, Any]

ENOUGH_DOCUMENTS = 30
"""For intervals over the text that hold the truth 91 times in 100 or more: see evaluation/statistics.py."""
POLICY_ORDER = ("streaming", "recompute", "dense")


def printable(name: str) -> str:
    """A name on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name)


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def counted(count: int, noun: str) -> str:
    """``one slot``, ``4 slots``."""
    return f"one {noun}" if count == 1 else f"{count} {noun}s"


# -- layouts ----------------------------------------------------------------------------------------


def num_slots(row: Row) -> int:
    """N of a row: the keys that a query sees."""
    return int(row["sinks"] + row["window"])


def layout_name(row: Row) -> str:
    """``1+127`` for streaming, ``recompute 128`` for the last 128 tokens anew, ``dense``."""
    if row["policy"] == "streaming":
        return f"{row['sinks']}+{row['window']}"
    return f"recompute {num_slots(row)}" if row["policy"] == "recompute" else str(row["policy"])


def layout_names(rows: Iterable[Row]) -> list[str]:
    """The layouts of some rows, each once: streaming by length and sinks, then the other policies."""

    def order(row: Row) -> tuple[int, ...]:
        return (
            POLICY_ORDER.index(row["policy"]),
            num_slots(row),
            row["sinks"] if row["policy"] == "streaming" else 0,
        )

    return list(dict.fromkeys(layout_name(row) for row in sorted(rows, key=order)))


# -- numbers ----------------------------------------------------------------------------------------


def perplexity_text(perplexity: float) -> str:
    """Four or so digits, whatever the size: 9.92, 123.5, 29,214, 1.2e+09."""
    if perplexity >= 1e6:
        return f"{perplexity:.2g}"
    return f"{perplexity:,.{2 if perplexity < 100 else 1 if perplexity < 1000 else 0}f}"


def ratio_text(ratio: float) -> str:
    """Three digits: 0.913, 8.50, 96.1, 1,240."""
    size = abs(ratio)
    return f"{ratio:,.{0 if size >= 999.5 else 1 if size >= 99.95 else 2 if size >= 1 else 3}f}"


def share_text(share: float) -> str:
    """``47%``; one decimal below ten per cent, where it tells."""
    percent = 100 * share
    if 0 < percent < 0.05:
        return "< 0.1%"
    return f"{percent:.0f}%" if percent >= 9.95 or percent == 0 else f"{percent:.1f}%"


def few_documents(rows: Iterable[Row]) -> dict[str, int]:
    """How many documents were scored of the texts of which that is known and too few."""
    most: dict[str, int] = {}
    for row in rows:
        most[row["text"]] = max(most.get(row["text"], 0), row.get("documents_scored", ENOUGH_DOCUMENTS))
    return {text: count for text, count in most.items() if count < ENOUGH_DOCUMENTS}


def share_interval_text(row: Row) -> str:
    """``79% to 88%``: the 95% interval of an accuracy."""
    low, high = row["ci95"]
    return f"{share_text(low)} to {share_text(high)}"


def count_text(count: float) -> str:
    """``9.0k``, ``16.4M``, ``75.0B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f}{unit}"
    return f"{count:.0f}"


def bytes_text(num_bytes: float) -> str:
    """``9.5 MB``, in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.{0 if unit == 'B' or num_bytes >= 99.5 else 1}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def digits(low: float, high: float) -> int:
    """Decimals (3 to 6) that keep the ends of an interval apart, and apart from zero."""
    finest = min((x for x in ((high - low) / 5, abs(low), abs(high)) if x > 0), default=1.0)
    return min(6, max(3, math.ceil(-math.log10(finest))))


def loss_interval_text(row: Row, joiner: str = " to ") -> str:
    """``2.371 to 2.392``: the 95% interval of a loss, in nats."""
    low, high = row["ci95"]
    places = digits(low, high)
    return f"{low:.{places}f}{joiner}{high:.{places}f}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# -- differences ------------------------------------------------------------------------------------


def delta_text(pair: Row) -> str:
    """``-0.012``: a difference in nats, with its sign."""
    return f"{pair['delta_nats']:+z.{digits(*pair['ci95'])}f}"


def delta_interval_text(pair: Row) -> str:
    """``-0.020 to -0.004``: the 95% interval of a difference, in nats."""
    places = digits(*pair["ci95"])
    low, high = (f"{end:+z.{places}f}" for end in pair["ci95"])
    return f"{low} to {high}"


def over_text(pair: Row) -> str:
    """What an interval is over: ``text`` or ``3 seeds``."""
    return f"{pair['num_seeds']} seeds" if pair["interval"] == "seeds" else str(pair["interval"])


def is_measurable(pair: Row) -> bool:
    """Whether the interval of a difference leaves zero out."""
    low, high = pair["ci95"]
    return not low <= 0 <= high


def sign(pair: Row) -> int:
    """+1 or -1 where a difference is measurable, otherwise 0."""
    return 0 if not is_measurable(pair) else 1 if pair["delta_nats"] > 0 else -1


def size_text(pair: Row, against: str = "", over: str = "") -> str:
    """A difference and its interval: without signs where the sentence gives the direction.

    Args:
        against: words after the number, as `` to 1+127``.
        over: words after the interval, as ``, over text``.
    """
    if not is_measurable(pair):
        return f"{delta_text(pair)} nats (95% interval {delta_interval_text(pair)}{over})"
    places = digits(*pair["ci95"])
    low, high = (f"{end:.{places}f}" for end in sorted(map(abs, pair["ci95"])))
    return f"{abs(pair['delta_nats']):.{places}f} nats{against} (95% interval {low} to {high}{over})"


def sides(pair: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model, policy and layout of both sides: the pair's own, unless ``a_sinks``, … give a side another."""
    a, b = (
        {
            "model": pair[side],
            **{key: pair.get(f"{side}_{key}", pair[key]) for key in ("policy", "sinks", "window")},
        }
        for side in "ab"
    )
    return a, b


def side_layouts(pair: Row) -> tuple[str, str]:
    """Layouts of both sides, as ``("0+128", "1+127")``."""
    a, b = sides(pair)
    return layout_name(a), layout_name(b)


def pair_words(pair: Row) -> tuple[str, str]:
    """Who and where: ``("sink - vanilla", "1+127")``, or ``("sink", "0+128 - 1+127")`` within a model."""
    a, b = printable(pair["a"]), printable(pair["b"])
    a_layout, b_layout = side_layouts(pair)
    models = a if a == b else f"{a} - {b}"
    return models, a_layout if a_layout == b_layout else f"{a_layout} - {b_layout}"


def difference_words(pair: Row) -> str:
    """``sink - vanilla at 1+127: -0.012 nats (95% interval -0.020 to -0.004, over text)``."""
    models, layouts = pair_words(pair)
    is_one_layout = "+" in layouts and " - " not in layouts
    subject = f"{models} at {layouts}" if is_one_layout else f"{models}, {layouts}"
    interval = f"95% interval {delta_interval_text(pair)}, over {over_text(pair)}"
    if is_measurable(pair):
        return f"{subject}: {delta_text(pair)} nats ({interval})"
    return f"{subject}: no measurable difference ({delta_text(pair)} nats, {interval})"


def verdict(pair: Row) -> str:
    """``sink is better``, ``1+127 is better`` or ``no measurable difference``."""
    if not is_measurable(pair):
        return "no measurable difference"
    names = (pair["a"], pair["b"]) if pair["a"] != pair["b"] else side_layouts(pair)
    return f"{printable(names[pair['delta_nats'] > 0])} is better"
