"""The verdict: at most three sentences, made from the numbers, that claim no more than the intervals do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from sinktrain.report.contests import (
    Contest,
    Eviction,
    Subject,
    contests_of,
    eviction_of,
    lengths_of,
    sign_of,
    size_words,
    streaming_side,
    subjects_of,
    words_by_case,
)
from sinktrain.report.wording import (
    ENOUGH_DOCUMENTS,
    Results,
    Row,
    counted,
    few_documents,
    layout_name,
    listed,
    num_slots,
    printable,
    share_text,
    sides,
)
from sinktrain.streaming.layout import VANILLA_SINKS

MOST_IN_FULL = 3
"""Models that a sentence speaks of one by one; of more it gives counts and extremes."""

NEED_NATS = 0.01
"""About one per cent of perplexity: what may lose less is not said to need its slots."""

SEED_NOTE = "; one seed of each, another may differ"

NEXT_TO_NOTHING_NATS = 0.002
"""What surely loses less is not told as a loss, however sure it is."""


def verdict_sentences(results: Results) -> list[str]:
    """What each model needs, which is better, and what a team may conclude: at most three sentences."""
    subjects = subjects_of(results)
    evictions = [eviction_of(results, subject) for subject in subjects]
    contests = contests_of(results, subjects)
    sentences = [
        _eviction_sentence(evictions),
        _contest_sentence(results, contests),
        _team_sentence(results, evictions, contests),
    ]
    said = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences if sentence]
    return said or ["No differences were measured."]


# -- sentences --------------------------------------------------------------------------------------


def _eviction_sentence(evictions: Sequence[Eviction]) -> str:
    """What each subject loses without its first tokens, and what one slot repairs."""
    known = [eviction for eviction in evictions if eviction.pairs]
    if len(known) <= MOST_IN_FULL:
        return "; ".join(map(_eviction_clause, known))
    losers = sorted(
        (eviction for eviction in known if sign_of(eviction.pairs) == 1), key=lambda one: one.mean_nats
    )
    evicted = layout_name(sides(known[0].pairs[0])[0])
    head = f"without their first tokens ({evicted}), "
    if not losers:
        return f"{head}none of {len(known)} models loses measurably"
    least, most = losers[0], losers[-1]
    if least is most:
        needed = max(1, most.subject.num_sinks)
        return (
            f"{head}only {most.subject.shown} of {len(known)} models loses measurably: "
            f"{size_words(most.pairs)}, which {counted(needed, 'slot')} repair{'s' * (needed == 1)}"
        )
    return (
        f"{head}{len(losers)} of {len(known)} models lose measurably, from {size_words(least.pairs)} for "
        f"{least.subject.shown} to {size_words(most.pairs)} for {most.subject.shown}, which the slots that "
        "they need repair"
    )


def _eviction_clause(eviction: Eviction) -> str:
    subject, pairs = eviction.subject, eviction.pairs
    evicted, kept = (layout_name(side) for side in sides(pairs[0]))
    count = subject.num_sinks
    lost = "its first tokens" if not count else "its sink" if count == 1 else "its sinks"
    without = f"without {lost} ({evicted}), {subject.shown}"
    match sign_of(pairs):
        case 1 if _largest(pairs) < NEXT_TO_NOTHING_NATS:
            return f"{without} loses next to nothing against {kept}: {size_words(pairs)}"
        case 1:
            slots = f"its {'slot' if count == 1 else 'slots'}" if count else "one slot"
            repair = f"{slots} ({kept}) {'repair' if count > 1 else 'repairs'}"
            return f"{without} loses {size_words(pairs)}, which {repair}{_further_repair(eviction)}"
        case 0:
            return f"{without} shows no measurable difference from {kept}: {size_words(pairs)}"
        case -1:
            return f"{without} gains {size_words(pairs, f' on {kept}')}"
        case _:
            words = {1: "it loses", 0: "it shows no measurable difference:", -1: "it gains"}
            return f"{without} differs from {kept} unevenly: {words_by_case(pairs, words)}"


def _further_repair(eviction: Eviction) -> str:
    """What more slots than one repair: asked of models that were trained without sink tokens."""
    if not eviction.further:
        return ""
    more = layout_name(sides(eviction.further[0])[0])
    if sign_of(eviction.further) == 0:
        return f", and {more} nothing measurable beyond"
    if sign_of(eviction.further) == 1 or _largest(eviction.further) < NEXT_TO_NOTHING_NATS:
        return ""
    return f", and {more} another {size_words(eviction.further)}"


def _contest_sentence(results: Results, contests: Sequence[Contest]) -> str:
    """Which is better as each is usually streamed: with its own sinks, or four slots if it has none."""
    if len(contests) <= MOST_IN_FULL:
        return "; ".join(_contest_clause(results, contest) for contest in contests)
    counts = Counter(sign_of(contest.pairs) for contest in contests if contest.pairs)
    unpaired = sum(not contest.pairs for contest in contests)
    parts = [
        f"{counts[sign]} of {len(contests)} models {words}"
        for sign, words in (
            (-1, "are measurably better"),
            (1, "measurably worse"),
            (0, "show no measurable difference"),
            (None, "differ from text to text"),
        )
        if counts[sign]
    ]
    parts += [f"{unpaired} {'was' if unpaired == 1 else 'were'} not compared with it"] * (unpaired > 0)
    return f"against {contests[0].base.shown}, each as it is usually streamed: {', '.join(parts)}"


def _contest_clause(results: Results, contest: Contest) -> str:
    subject, base, pairs = contest.subject, contest.base, contest.pairs
    if not pairs:
        return _unpaired_clause(results, subject, base)
    a, b = (layout_name(side) for side in sides(pairs[0]))
    kept = (
        f"where both keep {a}"
        if a == b
        else f"as each is usually streamed ({subject.shown} {a}, {base.shown} {b})"
    )
    note = (
        "" if pairs[0]["interval"] == "seeds" else SEED_NOTE if _is_one_seed(contest) else "; not over seeds"
    )
    match sign_of(pairs):
        case -1 | 1 as sign:
            word = "better" if sign == -1 else "worse"
            return f"{kept}, {subject.shown} is {word} than {base.shown} by {size_words(pairs, note=note)}"
        case 0:
            size = size_words(pairs, note=note)
            return f"{kept}, {subject.shown} shows no measurable difference from {base.shown}: {size}"
        case _:
            words = {-1: "better by", 0: "no measurable difference:", 1: "worse by"}
            by_case = words_by_case(pairs, words)
            return f"{kept}, {subject.shown} against {base.shown} differs unevenly: {by_case}{note}"


def _is_one_seed(contest: Contest) -> bool:
    return len(contest.subject.models) == len(contest.base.models) == 1


def _largest(pairs: Sequence[Row]) -> float:
    """The largest size that the intervals allow."""
    return max(abs(float(end)) for pair in pairs for end in pair["ci95"])


def _unpaired_clause(results: Results, subject: Subject, base: Subject) -> str:
    """Models of different tokenizers: bits per byte side by side, and what that can't say."""
    names = f"{subject.shown} and {base.shown}"
    if subject.models[0]["tokenizer"] == base.models[0]["tokenizer"]:
        return f"no measured row compares {names} as each is usually streamed"
    why = f"the tokenizers of {names} differ, so their losses are not paired"
    texts = dict.fromkeys(row["text"] for row in results["perplexity"])
    parts = [
        f"{subject.shown} takes {a} and {base.shown} {b}"
        + (f" on {printable(text)}" if len(texts) > 1 else "")
        for text in texts
        for a, b in [(_bits_words(results, subject, text), _bits_words(results, base, text))]
        if a and b
    ]
    if not parts:
        return f"{why}, and bits per byte are not known for both"
    return f"{why}: in bits per byte, without an interval and so without a winner, {', '.join(parts)}"


def _bits_words(results: Results, subject: Subject, text: str) -> str:
    """``1.512 (1+63)`` in its own layout at the greatest length; nothing where it is not known."""
    for length in lengths_of(results):
        for sinks in (subject.num_sinks or VANILLA_SINKS, max(1, subject.num_sinks)):
            side = streaming_side("", sinks, length)
            bits = [
                row["bits_per_byte"]
                for row in results["perplexity"]
                if row["model"] in subject.model_names
                and row["text"] == text
                and all(row[key] == side[key] for key in ("policy", "sinks", "window"))
            ]
            if bits and None not in bits:
                return f"{fmean(bits):.3f} ({layout_name(side)})"
    return ""


def _team_sentence(results: Results, evictions: Sequence[Eviction], contests: Sequence[Contest]) -> str:
    """What follows for those who have to choose."""
    paired = [contest for contest in contests if contest.pairs]
    parts = []
    if len(paired) > MOST_IN_FULL:
        parts += _many_advice(paired)
    elif paired:
        parts += [
            _advice(contest, eviction)
            for contest in paired
            for eviction in evictions
            if eviction.subject is contest.subject
        ]
    else:
        parts += [_own_advice(eviction) for eviction in evictions[:MOST_IN_FULL] if eviction.pairs]
    if any(map(_is_one_seed, paired)):
        parts.append("train more seeds to be sure")
    few = few_documents(results["perplexity"]).values()
    if parts and few:
        fewest = counted(min(few), "document")
        parts.append(f"intervals from {fewest} say little of others: score {ENOUGH_DOCUMENTS} or more")
    parts += _memory_words(results)
    failed = [printable(row["model"]) for row in results["failed"]]
    parts += [f"{listed(failed)} could not be measured"] * bool(failed)
    return f"for a team: {'; '.join(parts)}" if parts else ""


def _advice(contest: Contest, eviction: Eviction) -> str:
    subject, base = contest.subject, contest.base
    a, b = sides(contest.pairs[0])
    other = f"{base.shown} with {counted(b['sinks'], 'slot')}"
    streams = {
        -1: f"streams better than {other}",
        1: f"streams worse than {other}",
        0: f"streams as well as {other}, as far as this could tell",
        None: f"streams better or worse than {other} from case to case",
    }[sign_of(contest.pairs)]
    needs = _needs_words(eviction) if subject.num_sinks else ""
    if a["sinks"] != subject.num_sinks:
        kept = f"with {counted(a['sinks'], 'slot')} kept"
        return (
            f"{subject.shown} {needs}, and {kept} {streams}" if needs else f"{subject.shown} {kept} {streams}"
        )
    if needs:
        return f"{subject.shown} {needs}, and with {'it' if subject.num_sinks == 1 else 'them'} {streams}"
    return f"{subject.shown} with {_own_slots(subject)} {streams}"


def _needs_words(eviction: Eviction) -> str:
    """``needs its one slot``; nothing where texts or models disagree."""
    match sign_of(eviction.pairs) if eviction.pairs else None:
        case 1:
            least = min(pair["ci95"][0] for pair in eviction.pairs)
            return f"{'needs' if least >= NEED_NATS else 'gains by'} {_own_slots(eviction.subject)}"
        case 0 if max(pair["ci95"][1] for pair in eviction.pairs) < NEED_NATS:
            return f"shows no need of {_own_slots(eviction.subject)}"
        case 0:
            return f"may need {_own_slots(eviction.subject)} or not"
        case -1:
            return f"streams better here without {_own_slots(eviction.subject)}"
    return ""


def _own_slots(subject: Subject) -> str:
    return f"its {counted(subject.num_sinks, 'slot')}" if subject.num_sinks else "its first tokens"


def _many_advice(contests: Sequence[Contest]) -> list[str]:
    named = {
        sign: [contest.subject.shown for contest in contests if sign_of(contest.pairs) == sign]
        for sign in (-1, 1)
    }
    base = contests[0].base.shown
    return [
        *[f"{listed(named[-1])} stream{'s' * (len(named[-1]) == 1)} better than {base}"] * bool(named[-1]),
        *[f"{listed(named[1])} stream{'s' * (len(named[1]) == 1)} worse than {base}"] * bool(named[1]),
    ] or [f"nothing measured here prefers another model to {base} or {base} to another"]


def _own_advice(eviction: Eviction) -> str:
    name, needs = eviction.subject.shown, _needs_words(eviction)
    if needs:
        return f"{name} {needs}"
    return f"whether {name} needs {_own_slots(eviction.subject)} differs from case to case"


def _memory_words(results: Results) -> list[str]:
    """Streaming is not memory, said where rows show it: right within the window, at chance beyond it."""
    rows = [row for row in results["streameval"] if row["policy"] == "streaming" and row["sinks"] > 0]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["model"], layout_name(row)), []).append(row)
    shown = []
    for group in groups.values():
        near = min(group, key=lambda row: float(row["distance_tokens"]))
        far = max(group, key=lambda row: float(row["distance_tokens"]))
        if near["distance_tokens"] >= near["window"] or far["distance_tokens"] <= num_slots(far):
            continue
        if near["ci95"][0] <= near["chance"]:
            continue
        if far["ci95"][0] > far["chance"] or far["ci95"][1] >= near["ci95"][0]:
            return []
        shown.append((near, far))
    if not shown:
        return []
    near, far = max(shown, key=lambda rows: (rows[0]["task"] == "access", num_slots(rows[0])))
    return [
        f"streaming is not memory: {printable(near['model'])} at {layout_name(near)} answers "
        f"{share_text(near['accuracy'])} of queries within its window and {share_text(far['accuracy'])} "
        f"beyond it, where chance is {share_text(far['chance'])}"
    ]
