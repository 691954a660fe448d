"""What the results say in sentences: the verdict, the findings, how to read them and their limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sinktrain.report.contests import Subject, deciding_pairs, eviction_of, size_words, subjects_of
from sinktrain.report.verdict import verdict_sentences
from sinktrain.report.wording import (
    Results,
    Row,
    counted,
    few_documents,
    is_measurable,
    layout_name,
    listed,
    printable,
    sides,
)

__all__ = [
    "READING",
    "failures",
    "has_one_tokenizer",
    "headline",
    "limits",
    "texts",
    "tokens_scored",
    "verdict_sentences",
]

YOUNG_MODEL_TOKENS = 1_000_000_000
MANY_DIFFERENCES = 20


def texts(results: Results) -> list[str]:
    """The texts that were scored, in the order of measurement."""
    return list(dict.fromkeys(row["text"] for row in results["perplexity"]))


def has_one_tokenizer(results: Results) -> bool:
    """Whether the models share a tokenizer, so that their losses can be compared."""
    return len({model["tokenizer"] for model in results["models"]}) <= 1


def tokens_scored(rows: Iterable[Row]) -> str:
    """``8,064 tokens scored``, of one text; several numbers where rows differ, and warnings.

    These are where policies score different tokens, and where tokens come from few documents.
    """
    rows = list(rows)
    by_policy: dict[str, set[int]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], set()).add(row["tokens_scored"])
    counts = {policy: " or ".join(f"{n:,}" for n in sorted(some)) for policy, some in by_policy.items()}
    first = next(iter(counts.values()), "0")
    others = [f"{policy} {count}" for policy, count in counts.items() if count != first]
    warning = f", but {listed(others)}: compare it by its differences" if others else ""
    few = [counted(count, "document") for count in few_documents(rows).values()]
    source = f", from {few[0]}: intervals are too narrow" if few else ""
    return f"{first} tokens scored{warning}{source}"


def headline(results: Results) -> list[str]:
    """The findings in sentences; they claim no more than the paired intervals do."""
    subjects = subjects_of(results)
    found = [
        (text, sentence)
        for text in texts(results)
        for sentence in (
            *_eviction_sentences(results, subjects, text),
            *_model_sentences(results, subjects, text),
        )
    ]
    if len(texts(results)) > 1:
        return [f"On {printable(text)}: {sentence}" for text, sentence in found]
    return [sentence for _, sentence in found] or ["No differences were measured."]


def _eviction_sentences(results: Results, subjects: Sequence[Subject], text: str) -> Iterator[str]:
    """What each subject loses when its first tokens are evicted."""
    for subject in subjects:
        for pair in eviction_of(results, subject).pairs:
            if pair["text"] != text:
                continue
            evicted, kept = (layout_name(side) for side in sides(pair))
            lost = ("its first token", "its sink", "its sinks")[min(2, subject.num_sinks)]
            without = f"Without {lost} ({evicted}), {printable(pair['a'])}"
            if not is_measurable(pair):
                yield f"{without} shows no measurable difference from {kept}: {size_words([pair])}."
            elif pair["delta_nats"] > 0:
                yield f"{without} loses {size_words([pair], f' to {kept}')}."
            else:
                yield f"{without} gains {size_words([pair], f' on {kept}')}."


def _model_sentences(results: Results, subjects: Sequence[Subject], text: str) -> Iterator[str]:
    """Which of two subjects is better where both keep their sinks."""
    num_sinks = {
        name: subject.num_sinks for subject in subjects for name in (subject.name, *subject.model_names)
    }
    for pair in deciding_pairs(results):
        a, b = sides(pair)
        if pair["text"] != text or pair["a"] == pair["b"] or not a["policy"] == b["policy"] == "streaming":
            continue
        if layout_name(a) != layout_name(b) or a["sinks"] != max(
            1, num_sinks[pair["a"]], num_sinks[pair["b"]]
        ):
            continue
        names = printable(pair["a"]), printable(pair["b"])
        if is_measurable(pair):
            word = "better" if pair["delta_nats"] < 0 else "worse"
            yield f"At {layout_name(a)}, {names[0]} is {word} than {names[1]} by {size_words([pair])}."
        else:
            yield (
                f"At {layout_name(a)}, {names[0]} shows no measurable difference from {names[1]}: "
                f"{size_words([pair])}."
            )


READING = (
    "Perplexity is exp(loss), the loss being the mean surprise per text token in nats; lower is better.",
    "A layout S+W keeps the first S tokens of a stream for ever and the newest W besides: 0+N drops even "
    "the first ones, 1+(N-1) spends one of N places on keeping the first; dense keeps everything, and "
    "recompute N reads the newest N tokens anew for every token, which is slow and sets the mark.",
    "Models and layouts are compared token by token on the same text, so look at the differences and their "
    "intervals, which are far narrower than the intervals of single losses; where an interval holds zero, "
    "no difference could be told.",
)


def failures(results: Results) -> list[str]:
    """What could not be measured, and why; a task that no model could be asked is told once."""
    sentences = [
        printable(row["error"] if "task" in row else f"{row['model']} could not be measured: {row['error']}")
        for row in results["failed"]
    ]
    return list(dict.fromkeys(sentences))


def limits(results: Results) -> list[str]:
    """What these results can't say."""
    sentences = []
    if len(texts(results)) == 1:
        sentences.append(
            f"One text was scored ({printable(texts(results)[0])}); another kind of text may differ."
        )
    sentences += [
        f"The tokens scored of {printable(text)} come from {counted(count, 'document')}: in simulations "
        "intervals over the text hold the truth 91 to 94 times in 100 at 30 documents, 82 to 87 times at 10, "
        "and less often below."
        for text, count in few_documents(results["perplexity"]).items()
    ]
    if not any(pair["interval"] == "seeds" for pair in results["paired"]):
        sentences.append(
            "Intervals are over the text only: how far the figures would move on more text of this kind, for "
            "these very models. They do not cover the training seed, and which of two models ends up better "
            "can flip with it."
        )
    else:
        sentences.append(
            "Intervals over seeds cover the training seed, on this very text, and no other text."
        )
    if len(results["paired"]) > MANY_DIFFERENCES:
        sentences.append(
            f"{len(results['paired'])} differences were measured, and one in twenty 95% intervals misses: "
            "one that is barely clear of zero says little by itself."
        )
    if any(pair["interval"] == "seeds" and pair["num_seeds"] == 2 for pair in results["paired"]):
        sentences.append(
            "An interval over two seeds reaches 13 standard errors either way: where it holds zero, that "
            "says little, and where it does not, the two may have agreed by chance."
        )
    if any(
        model["tokens_seen"] is not None and model["tokens_seen"] < YOUNG_MODEL_TOKENS
        for model in results["models"]
    ):
        sentences.append(
            "Models that have seen less than a billion tokens have usually grown no sink of their own: what "
            "a vanilla one does here at 0+N says little about what it would do after longer training."
        )
    if not has_one_tokenizer(results):
        sentences.append(
            "Models with different tokenizers score different tokens: losses and perplexities cannot be "
            "compared between them, only bits per byte, which are not paired and have no interval here."
        )
    return sentences
