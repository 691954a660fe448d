"""Who is compared with whom for a verdict, and what the intervals of those pairs say together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from sinktrain.report.wording import (
    Results,
    Row,
    digits,
    is_measurable,
    num_slots,
    over_text,
    pair_words,
    printable,
    sides,
    sign,
    size_text,
)
from sinktrain.streaming.layout import VANILLA_SINKS

INTERVALS = ("seeds", "text")
"""Of ``paired[]``, the one that says more about training first."""

MOST_AMONG_THEMSELVES = 4
"""Subjects that are all compared with one another where a reader looks first; of more, each with the base."""

Pairs = list[Row]
"""Differences of one kind, in one direction: one for each text, or for each text and model of an arm."""


@dataclass(frozen=True)
class Subject:
    """A model, or an arm over its seeds.

    Args:
        name: of the model or arm.
        num_sinks: sink tokens that it was trained with.
        models: the rows of ``models[]`` that it stands for.
    """

    name: str
    num_sinks: int
    models: tuple[Row, ...]

    @property
    def shown(self) -> str:
        return printable(self.name)

    @property
    def model_names(self) -> list[str]:
        return [model["name"] for model in self.models]


@dataclass(frozen=True)
class Eviction:
    """What a subject loses without its first tokens.

    Args:
        pairs: 0+N - the layout with as many slots as it has sinks, or with one.
        further: the layout with the most slots - that one; empty for models trained with sink tokens.
    """

    subject: Subject
    pairs: Pairs
    further: Pairs

    @property
    def mean_nats(self) -> float:
        return fmean(pair["delta_nats"] for pair in self.pairs)


@dataclass(frozen=True)
class Contest:
    """A subject against the base, where each keeps what it needs.

    Args:
        pairs: subject - base; empty where nothing pairs them.
    """

    subject: Subject
    base: Subject
    pairs: Pairs


# -- who and what is compared -----------------------------------------------------------------------


def deciding_pairs(results: Results) -> Pairs:
    """The pairs over seeds, and of those over text the ones that no arm over seeds stands for."""
    arms = _arms_over_seeds(results)
    in_arms = {model["name"] for model in results["models"] if model["arm"] in arms}
    return [
        pair
        for pair in results["paired"]
        if pair["interval"] == "seeds" or not {pair["a"], pair["b"]} <= in_arms
    ]


def own_rows(results: Results, rows: Iterable[Row]) -> list[Row]:
    """Of each model and policy, the rows of the greatest length; streaming in the layout of a verdict.

    That is as many slots as the model has sinks, or ``VANILLA_SINKS``; the most there are where it lacks.
    """
    rows = list(rows)
    wanted = {model["name"]: num_sinks(model) or VANILLA_SINKS for model in results["models"]}
    layouts: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for row in rows:
        layouts.setdefault((row["model"], row["policy"]), set()).add((num_slots(row), row["sinks"]))
    own = {
        (model, policy): max(some, key=lambda one: (one[0], one[1] == wanted[model], one[1]))
        for (model, policy), some in layouts.items()
    }
    return [
        row
        for row in rows
        if row["policy"] == "dense" or (num_slots(row), row["sinks"]) == own[row["model"], row["policy"]]
    ]


def num_sinks(model: Row) -> int:
    """Sink tokens that a model was trained with."""
    return int(model["sink"]["count"])


def _arms_over_seeds(results: Results) -> set[str]:
    paired = {pair[side] for pair in results["paired"] if pair["interval"] == "seeds" for side in "ab"}
    return paired | {row["arm"] for row in results["arms"]}


def main_pairs(results: Results, text: str) -> Pairs:
    """Of the deciding pairs of a text, what a reader sees first: those of the greatest length.

    Between models, only those with the base where there are many.
    """
    greatest, is_first = lengths_of(results)[:1], with_few_or_base(results)
    return [
        pair
        for pair in deciding_pairs(results)
        if pair["text"] == text
        and is_first(pair)
        and all(side["policy"] == "dense" or num_slots(side) in greatest for side in sides(pair))
    ]


def with_few_or_base(results: Results) -> Callable[[Row], bool]:
    """Whether a pair is within a subject or with the base; any is where subjects are few."""
    subjects = subjects_of(results)
    if len(subjects) <= MOST_AMONG_THEMSELVES:
        return lambda pair: True
    base = base_of(subjects)
    names = {base.name, *base.model_names}
    return lambda pair: pair["a"] == pair["b"] or pair["a"] in names or pair["b"] in names


def subjects_of(results: Results) -> list[Subject]:
    """The arms that have rows over seeds, and every other model by itself."""
    arms = _arms_over_seeds(results)
    groups: dict[tuple[bool, str], list[Row]] = {}
    for model in results["models"]:
        is_in_arm = model["arm"] in arms
        groups.setdefault((is_in_arm, model["arm"] if is_in_arm else model["name"]), []).append(model)
    return [Subject(name, num_sinks(models[0]), tuple(models)) for (_, name), models in groups.items()]


def differences_of(pairs: Iterable[Row], a: Row, b: Row) -> Pairs:
    """The pairs of two sides, turned to a - b whichever way they are stored."""
    turned = ((pair, sides(pair)) for pair in pairs)
    return [flipped(pair) if found == (b, a) else pair for pair, found in turned if found in ((a, b), (b, a))]


def flipped(pair: Row) -> Row:
    """The same difference as b - a."""
    a, b = sides(pair)
    low, high = pair["ci95"]
    return {
        **pair,
        **{f"a_{key}": b[key] for key in ("policy", "sinks", "window")},
        **{f"b_{key}": a[key] for key in ("policy", "sinks", "window")},
        "a": pair["b"],
        "b": pair["a"],
        "delta_nats": -pair["delta_nats"],
        "ci95": [-high, -low],
        **({"deltas": [-delta for delta in pair["deltas"]]} if "deltas" in pair else {}),
    }


def lengths_of(results: Results) -> list[int]:
    """N of the streaming layouts, the longest first: it is the one that a verdict is about."""
    return sorted(
        {num_slots(row) for row in results["perplexity"] if row["policy"] == "streaming"}, reverse=True
    )


def streaming_side(name: str, sinks: int, length: int) -> Row:
    """A side of ``length`` slots, as ``wording.sides`` gives them."""
    return {"model": name, "policy": "streaming", "sinks": sinks, "window": length - sinks}


def _pairs_between(
    results: Results, interval: str, a: Subject, a_sinks: int, b: Subject, b_sinks: int, length: int
) -> Pairs:
    """Over seeds: arm against arm. Over text: model against model, or each against itself."""
    if interval == "seeds":
        names = [(a.name, b.name)]
    elif a is b:
        names = [(name, name) for name in a.model_names]
    else:
        names = list(itertools.product(a.model_names, b.model_names))
    rows = [pair for pair in results["paired"] if pair["interval"] == interval]
    return [
        pair
        for a_name, b_name in names
        for pair in differences_of(
            rows, streaming_side(a_name, a_sinks, length), streaming_side(b_name, b_sinks, length)
        )
    ]


def eviction_of(results: Results, subject: Subject) -> Eviction:
    """At the greatest length whose rows are paired, over seeds if they are."""
    kept = max(1, subject.num_sinks)
    for interval, length in itertools.product(INTERVALS, lengths_of(results)):
        if evicted := _pairs_between(results, interval, subject, 0, subject, kept, length):
            most = max(row["sinks"] for row in results["perplexity"] if num_slots(row) == length)
            further = _pairs_between(results, interval, subject, most, subject, kept, length)
            return Eviction(subject, evicted, [] if subject.num_sinks else further)
    return Eviction(subject, [], [])


def contests_of(results: Results, subjects: Sequence[Subject]) -> list[Contest]:
    """Every other subject against the base."""
    if not subjects:
        return []
    base = base_of(subjects)
    return [
        Contest(subject, base, _contest_pairs(results, subject, base))
        for subject in subjects
        if subject is not base
    ]


def base_of(subjects: Sequence[Subject]) -> Subject:
    """The first that is vanilla, or the first."""
    return next((subject for subject in subjects if subject.models[0]["sink"]["kind"] == "none"), subjects[0])


def _contest_pairs(results: Results, subject: Subject, base: Subject) -> Pairs:
    """Pairs in each one's own layout if there are any, otherwise in one layout that keeps what both need."""
    own = (subject.num_sinks or VANILLA_SINKS, base.num_sinks or VANILLA_SINKS)
    most = max(1, subject.num_sinks, base.num_sinks)
    for interval, length in itertools.product(INTERVALS, lengths_of(results)):
        for a_sinks, b_sinks in (own, (max(own),) * 2, (most,) * 2):
            if pairs := _pairs_between(results, interval, subject, a_sinks, base, b_sinks, length):
                return pairs
    return []


# -- claims -----------------------------------------------------------------------------------------


def sign_of(pairs: Pairs) -> int | None:
    """+1 or -1 where every text says so, 0 where none shows a difference, None where they disagree."""
    signs = set(map(sign, pairs))
    return signs.pop() if len(signs) == 1 else None


def size_words(pairs: Pairs, against: str = "", note: str = "") -> str:
    """How large a difference is: with its interval on one text, as a range over several that agree.

    Args:
        against: words after the number.
        note: words at the end of the brackets.
    """
    over = f" over {over_text(pairs[0])}" if note or pairs[0]["interval"] == "seeds" else ""
    if len(pairs) == 1:
        return size_text(pairs[0], against, over + note)
    places = max(digits(*pair["ci95"]) for pair in pairs)
    is_clear = is_measurable(pairs[0])
    deltas = [abs(pair["delta_nats"]) if is_clear else pair["delta_nats"] for pair in pairs]
    low, high = (f"{end:{'' if is_clear else '+z'}.{places}f}" for end in (min(deltas), max(deltas)))
    zero = "clear of zero" if is_clear else "holding zero"
    cases = " x ".join(
        f"{len(values)} {noun}"
        for noun, values in (("models", _models(pairs)), ("texts", _texts(pairs)))
        if values
    )
    return f"{low} to {high} nats{against} ({cases}, each 95% interval{over} {zero}{note})"


def words_by_case(pairs: Pairs, words: dict[int, str]) -> str:
    """``on a.txt better by …, on b.txt no measurable difference: …``: for texts or models that disagree."""
    return ", ".join(f"{_case(pair, pairs)} {words[sign(pair)]} {size_words([pair])}" for pair in pairs)


def _case(pair: Row, pairs: Pairs) -> str:
    """What sets a pair apart from the others: ``on a.txt``, ``with sink-1 - vanilla-1``."""
    parts = [f"on {printable(pair['text'])}"] * bool(_texts(pairs))
    return " ".join([*parts, *[f"with {pair_words(pair)[0]}"] * bool(_models(pairs))])


def _texts(pairs: Pairs) -> set[str]:
    """The texts of some pairs, if there are several."""
    return _several(pair["text"] for pair in pairs)


def _models(pairs: Pairs) -> set[str]:
    """The models of some pairs, if there are several: on one side where the other is always the same."""
    return max((_several(pair[side] for pair in pairs) for side in "ab"), key=len)


def _several(names: Iterable[str]) -> set[str]:
    found = set(names)
    return found if len(found) > 1 else set()
