"""What the results say, in words: numbers with as many digits as they carry, layouts, differences, limits.

``results`` is everywhere the dict of ``results.json``; rounding happens here and in no file before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Results = Mapping[str, Any]
Row = Mapping[str, Any]

POLICY_ORDER = ("streaming", "recompute", "dense")
YOUNG_MODEL_TOKENS = 1_000_000_000


def printable(name: str) -> str:
    """A name on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name)


def layout_name(row: Row) -> str:
    """``1+127`` for streaming, otherwise the policy's own name."""
    return f"{row['sinks']}+{row['window']}" if row["policy"] == "streaming" else str(row["policy"])


def layout_names(rows: Iterable[Row]) -> list[str]:
    """The layouts of some rows, each once: streaming by length and sinks, then the other policies."""

    def order(row: Row) -> tuple[int, ...]:
        policy = POLICY_ORDER.index(row["policy"])
        return (
            (policy, row["sinks"] + row["window"], row["sinks"])
            if row["policy"] == "streaming"
            else (policy,)
        )

    return list(dict.fromkeys(layout_name(row) for row in sorted(rows, key=order)))


def texts(results: Results) -> list[str]:
    """The texts that were scored, in the order of measurement."""
    return list(dict.fromkeys(row["text"] for row in results["perplexity"]))


def tokens_scored(rows: Iterable[Row]) -> str:
    """``8,064 tokens scored``; several numbers where rows differ."""
    return " or ".join(f"{n:,}" for n in sorted({row["tokens_scored"] for row in rows})) + " tokens scored"


def perplexity_text(perplexity: float) -> str:
    """Four or so digits, whatever the size: 9.92, 123.5, 29,214, 1.2e+09."""
    if perplexity >= 1e6:
        return f"{perplexity:.2g}"
    return f"{perplexity:,.{2 if perplexity < 100 else 1 if perplexity < 1000 else 0}f}"


def digits(low: float, high: float) -> int:
    """Decimals (3 to 6) that keep the ends of an interval apart, and apart from zero."""
    finest = min((x for x in ((high - low) / 5, abs(low), abs(high)) if x > 0), default=1.0)
    return min(6, max(3, math.ceil(-math.log10(finest))))


def loss_interval_text(row: Row, joiner: str = " to ") -> str:
    """``2.371 to 2.392``: the 95% interval of a loss, in nats."""
    low, high = row["ci95"]
    places = digits(low, high)
    return f"{low:.{places}f}{joiner}{high:.{places}f}"


def delta_text(pair: Row) -> str:
    """``-0.012``: a difference in nats, with its sign."""
    return f"{pair['delta_nats']:+z.{digits(*pair['ci95'])}f}"


def delta_interval_text(pair: Row) -> str:
    """``-0.020 to -0.004``: the 95% interval of a difference, in nats."""
    places = digits(*pair["ci95"])
    low, high = (f"{end:+z.{places}f}" for end in pair["ci95"])
    return f"{low} to {high}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def is_measurable(pair: Row) -> bool:
    """Whether the interval of a difference leaves zero out."""
    low, high = pair["ci95"]
    return not low <= 0 <= high


def side_layouts(pair: Row) -> tuple[str, str]:
    """Layouts of both sides: the pair's own, unless ``a_sinks``, … give each side another."""
    a, b = (
        {
            **pair,
            "sinks": pair.get(f"{side}_sinks", pair["sinks"]),
            "window": pair.get(f"{side}_window", pair["window"]),
        }
        for side in "ab"
    )
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
    interval = f"95% interval {delta_interval_text(pair)}, over {pair['interval']}"
    if is_measurable(pair):
        return f"{subject}: {delta_text(pair)} nats ({interval})"
    return f"{subject}: no measurable difference ({delta_text(pair)} nats, {interval})"


def verdict(pair: Row) -> str:
    """``sink is better``, ``1+127 is better`` or ``no measurable difference``."""
    if not is_measurable(pair):
        return "no measurable difference"
    names = (pair["a"], pair["b"]) if pair["a"] != pair["b"] else side_layouts(pair)
    return f"{printable(names[pair['delta_nats'] > 0])} is better"


def headline(results: Results) -> list[str]:
    """The findings in sentences; they claim no more than the paired intervals do."""
    found = [
        f"On {printable(text)}: {sentence}" if len(texts(results)) > 1 else sentence
        for text in texts(results)
        for sentence in (*_eviction_sentences(results, text), *_model_sentences(results, text))
    ]
    return found or ["No differences were measured."]


def _eviction_sentences(results: Results, text: str) -> list[str]:
    """What each model loses when its first tokens are evicted, from its pair 0+N - S+(N-S)."""
    sentences = []
    for model in results["models"]:
        pairs = [
            pair
            for pair in results["paired"]
            if pair["text"] == text and pair["a"] == pair["b"] == model["name"] and pair.get("a_sinks") == 0
        ]
        wanted_sinks = max(1, model["sink"]["count"])
        for pair in sorted(pairs, key=lambda pair: bool(pair["b_sinks"] != wanted_sinks))[:1]:
            without, other = side_layouts(pair)
            subject = (
                f"Without {_first_tokens(model, pair['b_sinks'])} ({without}), {printable(model['name'])}"
            )
            if not is_measurable(pair):
                sentences.append(
                    f"{subject} shows no measurable difference from {other}: {_size_words(pair)}."
                )
            elif pair["delta_nats"] > 0:
                sentences.append(f"{subject} loses {_size_words(pair, f' to {other}')}.")
            else:
                sentences.append(f"{subject} gains {_size_words(pair, f' on {other}')}.")
    return sentences


def _first_tokens(model: Row, count: int) -> str:
    if model["sink"]["kind"] == "token":
        return "its sink" if model["sink"]["count"] == 1 else "its sinks"
    return "its first token" if count == 1 else f"its first {count} tokens"


def _model_sentences(results: Results, text: str) -> list[str]:
    """Which of two models is better where both keep their sinks."""
    num_sinks = {model["name"]: model["sink"]["count"] for model in results["models"]}
    sentences = []
    for pair in results["paired"]:
        a, b = pair["a"], pair["b"]
        if pair["text"] != text or a == b or pair["policy"] != "streaming":
            continue
        a_layout, b_layout = side_layouts(pair)
        if a_layout != b_layout or pair["sinks"] != max(1, num_sinks[a], num_sinks[b]):
            continue
        a, b = printable(a), printable(b)
        if is_measurable(pair):
            word = "better" if pair["delta_nats"] < 0 else "worse"
            sentences.append(f"At {a_layout}, {a} is {word} than {b} by {_size_words(pair)}.")
        else:
            sentences.append(
                f"At {a_layout}, {a} shows no measurable difference from {b}: {_size_words(pair)}."
            )
    return sentences


def _size_words(pair: Row, against: str = "") -> str:
    """A difference and its interval: without signs where the sentence gives the direction."""
    if not is_measurable(pair):
        return f"{delta_text(pair)} nats (95% interval {delta_interval_text(pair)})"
    places = digits(*pair["ci95"])
    low, high = (f"{end:.{places}f}" for end in sorted(map(abs, pair["ci95"])))
    return f"{abs(pair['delta_nats']):.{places}f} nats{against} (95% interval {low} to {high})"


READING = (
    "Perplexity is exp(loss), the loss being the mean surprise per text token in nats; lower is better.",
    "A layout S+W keeps the first S tokens of a stream for ever and the newest W besides: 0+N drops even "
    "the first ones, 1+(N-1) spends one of N places on keeping the first, and dense keeps everything.",
    "Models and layouts are compared token by token on the same text, so look at the differences and their "
    "intervals, which are far narrower than the intervals of single losses; where an interval holds zero, "
    "no difference was measured.",
)


def limits(results: Results) -> list[str]:
    """What these results can't say."""
    sentences = []
    if len(texts(results)) == 1:
        sentences.append(
            f"One text was scored ({printable(texts(results)[0])}); another kind of text may differ."
        )
    if not any(pair["interval"] == "seeds" for pair in results["paired"]):
        sentences.append(
            "Intervals are over the text only: how far the figures would move on more text of this kind, for "
            "these very models. They do not cover the training seed, and which of two models ends up better "
            "can flip with it."
        )
    if any((model["tokens_seen"] or YOUNG_MODEL_TOKENS) < YOUNG_MODEL_TOKENS for model in results["models"]):
        sentences.append(
            "Models that have seen less than a billion tokens have usually grown no sink of their own: what "
            "a vanilla one does here at 0+N says little about what it would do after longer training."
        )
    return sentences
