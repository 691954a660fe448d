"""The report in words and tables: verdicts that fit the numbers, tables that hold every row, its files."""

from __future__ import annotations

import html
import json
import math
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from example_results import example_results
from hypothesis import given, settings
from hypothesis import strategies as st

from sinktrain.errors import ConfigError
from sinktrain.report import findings, wording
from sinktrain.report.contests import differences_of, flipped, main_pairs, own_rows
from sinktrain.report.loss_tables import difference_table, perplexity_table, removal_table
from sinktrain.report.markdown import results_markdown
from sinktrain.report.page import report_page
from sinktrain.report.paper import CITATION, PERPLEXITIES, paper_table
from sinktrain.report.probe_tables import (
    PROXY_NOTE,
    latency_table,
    norms_table,
    sink_table,
    streameval_table,
    verified_table,
)
from sinktrain.report.setting_tables import model_table
from sinktrain.report.terminal import terminal_table
from sinktrain.report.write import check_report_folder, write_report

Results = dict[str, Any]

LAYOUTS = ["0+128", "1+127", "2+126", "4+124", "dense"]
HOSTILE = '<script>alert("1")</script>|_x_\n\x1b[31m'
SURE = "; train more seeds to be sure."
NOTE = " over text; one seed of each, another may differ"


def a_model(name: str, sinks: int = 0, **changes: Any) -> dict[str, Any]:
    kind = "token" if sinks else "none"
    sink = {"kind": kind, "count": sinks, "token_ids": list(range(500, 500 + sinks))}
    model = {"name": name, "source": f"runs/{name}", "parameters": 1_104_384, "sink": sink}
    facts = {"tokens_seen": 500_000, "seed": 1, "arm": name, "tokenizer": "ab" * 32, "trained_length": 256}
    return {**model, **facts, **changes}


def a_layout(layout: str) -> dict[str, Any]:
    if layout == "dense":
        return {"policy": "dense", "sinks": 0, "window": 4096}
    sinks, window = map(int, layout.split("+"))
    return {"policy": "streaming", "sinks": sinks, "window": window}


def a_pair(
    a: str, b: str, delta: float, half: float, layout: str = "1+127", b_layout: str = "", **changes: Any
) -> dict[str, Any]:
    pair = {"a": a, "b": b, "text": "book.txt", **a_layout(layout), "delta_nats": delta, "interval": "text"}
    pair |= {"ci95": [delta - half, delta + half], "p": 0.5 if half >= abs(delta) else 0.0009995}
    if b_layout:
        pair |= {f"a_{key}": pair[key] for key in ("sinks", "window")}
        pair |= {f"b_{key}": a_layout(b_layout)[key] for key in ("sinks", "window")}
    return {**pair, **changes}


def over_seeds(pair: dict[str, Any]) -> dict[str, Any]:
    delta = pair["delta_nats"]
    return pair | {"interval": "seeds", "num_seeds": 3, "deltas": [delta - 0.001, delta, delta + 0.001]}


def some_results(*models: dict[str, Any], text: str = "book.txt") -> Results:
    """Results of some models in all layouts; a model with a sink loses 0.15 nats at 0+128."""
    results: Results = {
        "schema_version": 1,
        "environment": {"device": "cpu", "versions": {"torch": "2.13"}},
    }
    results |= {name: [] for name, rows in example_results().items() if isinstance(rows, list)}
    results["models"] = list(models)
    for model in models:
        loses_sink = 0.15 if model["sink"]["count"] else 0.001
        for layout in LAYOUTS:
            loss = 2.3 + loses_sink * (layout == "0+128")
            where = {"model": model["name"], "text": text, **a_layout(layout)}
            numbers = {"tokens_scored": 8064, "loss_nats": loss, "perplexity": math.exp(loss)}
            numbers |= {"bits_per_byte": loss / 2.7, "ci95": [loss - 0.0123, loss + 0.0123]}
            results["perplexity"].append(where | numbers)
            results["position_loss"].append(where | {"stream_pos": [64.0, 192.0], "loss_nats": [2.5, loss]})
        name = model["name"]
        results["paired"].append(a_pair(name, name, loses_sink, 0.01, "0+128", "1+127", text=text))
    for first, second in pairwise(models):
        results["paired"].append(a_pair(second["name"], first["name"], -0.012, 0.008, text=text))
    return results


def verdict_of(*pairs: dict[str, Any], models: tuple[dict[str, Any], ...] = ()) -> list[str]:
    """The verdict on some pairs of a vanilla and a sink model, or of other models."""
    results = some_results(*(models or (a_model("vanilla"), a_model("sink", 1))))
    results["paired"] = list(pairs)
    for text in {pair["text"] for pair in pairs} - {"book.txt"}:
        results["perplexity"] += [{**row, "text": text} for row in results["perplexity"]]
    return findings.verdict_sentences(results)


@pytest.fixture
def results() -> Results:
    return some_results(a_model("vanilla"), a_model("sink", 1))


@pytest.fixture(scope="module")
def example() -> Results:
    return example_results()


# -- numbers and differences in words ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (
            a_pair("sink", "vanilla", -0.012, 0.008),
            "sink - vanilla at 1+127: -0.012 nats (95% interval -0.020 to -0.004, over text)",
        ),
        (
            over_seeds(a_pair("sink", "vanilla", 0.012, 0.008, "dense")),
            "sink - vanilla, dense: +0.012 nats (95% interval +0.004 to +0.020, over 3 seeds)",
        ),
        (
            a_pair("sink", "vanilla", -0.001, 0.004),
            "sink - vanilla at 1+127: no measurable difference "
            "(-0.001 nats, 95% interval -0.005 to +0.003, over text)",
        ),
        (
            a_pair("a", "b", 0.0, 0.0),
            "a - b at 1+127: no measurable difference "
            "(+0.000 nats, 95% interval +0.000 to +0.000, over text)",
        ),
        (
            a_pair("sink", "sink", 0.15, 0.01, "0+128", "1+127"),
            "sink, 0+128 - 1+127: +0.150 nats (95% interval +0.140 to +0.160, over text)",
        ),
        (
            a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124"),
            "sink - vanilla, 1+127 - 4+124: -0.012 nats (95% interval -0.020 to -0.004, over text)",
        ),
        (
            a_pair("sink", "sink", -0.02, 0.01, a_policy="recompute", b_policy="streaming"),
            "sink, recompute 128 - 1+127: -0.020 nats (95% interval -0.030 to -0.010, over text)",
        ),
    ],
)
def test_difference_words_say_who_where_sign_interval_and_zero(pair: dict[str, Any], words: str) -> None:
    assert wording.difference_words(pair) == words


def test_an_interval_that_touches_zero_shows_no_difference() -> None:
    assert not wording.is_measurable(a_pair("a", "b", 0.004, 0.004))


def test_a_bound_beside_zero_is_never_rounded_to_zero() -> None:
    words = wording.difference_words(a_pair("a", "b", -0.01, 0.00996))
    assert "-0.01996 to -0.00004" in words


def test_verdict_of_a_pair_names_the_one_with_less_loss() -> None:
    assert wording.verdict(a_pair("sink", "vanilla", -0.012, 0.008)) == "sink is better"
    assert wording.verdict(a_pair("sink", "vanilla", 0.012, 0.008)) == "vanilla is better"
    assert wording.verdict(a_pair("sink", "sink", 0.15, 0.01, "0+128", "1+127")) == "1+127 is better"
    assert wording.verdict(a_pair("sink", "vanilla", 0.0, 0.008)) == "no measurable difference"


def test_a_flipped_pair_is_the_same_difference_from_the_other_side() -> None:
    pair = over_seeds(a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124"))
    turned = flipped(pair)
    assert wording.difference_words(turned) == (
        "vanilla - sink, 4+124 - 1+127: +0.012 nats (95% interval +0.004 to +0.020, over 3 seeds)"
    )
    assert wording.sides(turned) == wording.sides(pair)[::-1]
    assert flipped(turned)["deltas"] == pair["deltas"]
    assert differences_of([pair], *wording.sides(turned)) == [turned]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (wording.perplexity_text(9.916), "9.92"),
        (wording.perplexity_text(123.45), "123.5"),
        (wording.perplexity_text(29214.2), "29,214"),
        (wording.perplexity_text(1.23e9), "1.2e+09"),
        (wording.ratio_text(0.9126), "0.913"),
        (wording.ratio_text(96.14), "96.14"),
        (wording.ratio_text(1240.3), "1,240"),
        (wording.share_text(0.47), "47%"),
        (wording.share_text(0.0213), "2.1%"),
        (wording.share_text(0.0), "0%"),
        (wording.bytes_text(512), "512 B"),
        (wording.bytes_text(65_536), "65.5 kB"),
        (wording.bytes_text(131_072), "131 kB"),
        (wording.bytes_text(80e9), "80.0 GB"),
        (wording.listed(["a"]), "a"),
        (wording.listed(["a", "b", "c"]), "a, b and c"),
        (wording.counted(1, "slot"), "one slot"),
        (wording.counted(4, "slot"), "4 slots"),
    ],
)
def test_numbers_of_any_size_are_short(words: str, shown: str) -> None:
    assert words == shown


# -- the verdict: what each model needs -------------------------------------------------------------


def test_verdict_says_what_is_lost_without_the_first_tokens_and_what_slots_repair() -> None:
    lost, *_ = verdict_of(
        a_pair("vanilla", "vanilla", 0.08, 0.01, "0+128", "1+127"),
        a_pair("vanilla", "vanilla", -0.02, 0.005, "4+124", "1+127"),
        a_pair("sink", "sink", 0.9, 0.01, "0+128", "1+127"),
        a_pair("sink", "sink", -0.02, 0.005, "4+124", "1+127"),
    )
    assert lost == (
        "Without its first tokens (0+128), vanilla loses 0.080 nats (95% interval 0.070 to 0.090), which one "
        "slot (1+127) repairs, and 4+124 another 0.020 nats (95% interval 0.015 to 0.025); "
        "without its sink (0+128), sink loses 0.900 nats (95% interval 0.890 to 0.910), which its slot "
        "(1+127) repairs."
    )


def test_verdict_says_where_further_slots_repair_nothing_measurable() -> None:
    lost, *_ = verdict_of(
        a_pair("vanilla", "vanilla", 0.08, 0.01, "0+128", "1+127"),
        a_pair("vanilla", "vanilla", -0.002, 0.005, "4+124", "1+127"),
    )
    assert lost.endswith("which one slot (1+127) repairs, and 4+124 nothing measurable beyond.")


def test_verdict_counts_the_slots_of_a_model_with_two_sinks() -> None:
    lost, advice = verdict_of(a_pair("two", "two", 0.9, 0.01, "0+128", "2+126"), models=(a_model("two", 2),))
    assert lost == (
        "Without its sinks (0+128), two loses 0.900 nats (95% interval 0.890 to 0.910), "
        "which its slots (2+126) repair."
    )
    assert advice == "For a team: two needs its 2 slots."


def test_verdict_finds_no_measurable_loss_where_the_interval_holds_zero() -> None:
    lost, advice = verdict_of(
        a_pair("vanilla", "vanilla", 0.001, 0.008, "0+128", "1+127"), models=(a_model("vanilla"),)
    )
    assert lost == (
        "Without its first tokens (0+128), vanilla shows no measurable difference from 1+127: "
        "+0.001 nats (95% interval -0.007 to +0.009)."
    )
    assert advice == "For a team: vanilla shows no need of its first tokens."


def test_what_surely_is_next_to_nothing_is_no_loss_and_no_repair() -> None:
    beyond = a_pair("vanilla", "vanilla", -0.001, 0.0005, "4+124", "1+127")
    little = a_pair("vanilla", "vanilla", 0.001, 0.0005, "0+128", "1+127")
    lost, *_ = verdict_of(little, beyond, models=(a_model("vanilla"),))
    assert lost == (
        "Without its first tokens (0+128), vanilla loses next to nothing against 1+127: 0.0010 nats "
        "(95% interval 0.0005 to 0.0015)."
    )
    more = a_pair("vanilla", "vanilla", 0.08, 0.01, "0+128", "1+127")
    lost, *_ = verdict_of(more, beyond, models=(a_model("vanilla"),))
    assert lost.endswith("which one slot (1+127) repairs.")


def test_advice_from_several_texts_tells_of_the_one_with_the_fewest_documents() -> None:
    pairs = [a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124", text=text) for text in "abc"]
    results = some_results(a_model("vanilla"), a_model("sink", 1)) | {"paired": pairs}
    scored = results["perplexity"]
    results["perplexity"] = [
        {**row, "text": text, "documents_scored": count}
        for text, count in (("a", 100), ("b", 3), ("c", 7))
        for row in scored
    ]
    assert "; intervals from 3 documents say little of others" in findings.verdict_sentences(results)[-1]
    assert [sentence[:40] for sentence in findings.limits(results) if "simulations" in sentence] == [
        "The tokens scored of b come from 3 docum",
        "The tokens scored of c come from 7 docum",
    ]


@pytest.mark.parametrize(("count", "words"), [(1, "one document"), (29, "29 documents"), (30, None)])
def test_advice_from_few_documents_says_so(count: int, words: str | None) -> None:
    results = some_results(a_model("vanilla"), a_model("sink", 1))
    results["paired"] = [a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124")]
    for row in results["perplexity"]:
        row["documents_scored"] = count
    advice = findings.verdict_sentences(results)[-1]
    told = f"; intervals from {words} say little of others: score 30 or more." if words else SURE
    assert advice.endswith(told)


def test_verdict_can_find_eviction_a_gain() -> None:
    lost, advice = verdict_of(
        a_pair("vanilla", "vanilla", -0.02, 0.01, "0+128", "1+127"), models=(a_model("vanilla"),)
    )
    assert lost == (
        "Without its first tokens (0+128), vanilla gains 0.020 nats on 1+127 (95% interval 0.010 to 0.030)."
    )
    assert advice == "For a team: vanilla streams better here without its first tokens."


def test_verdict_gives_the_range_over_texts_that_agree() -> None:
    lost, *_ = verdict_of(
        a_pair("sink", "sink", 0.9, 0.01, "0+128", "1+127"),
        a_pair("sink", "sink", 0.7, 0.01, "0+128", "1+127", text="news.txt"),
    )
    assert lost == (
        "Without its sink (0+128), sink loses 0.700 to 0.900 nats (2 texts, each 95% interval clear of "
        "zero), which its slot (1+127) repairs."
    )
    lost, *_ = verdict_of(
        a_pair("sink", "sink", -0.001, 0.01, "0+128", "1+127"),
        a_pair("sink", "sink", 0.002, 0.01, "0+128", "1+127", text="news.txt"),
    )
    assert lost.endswith("1+127: -0.001 to +0.002 nats (2 texts, each 95% interval holding zero).")


def test_verdict_tells_texts_apart_that_disagree() -> None:
    lost, *_ = verdict_of(
        a_pair("sink", "sink", 0.9, 0.01, "0+128", "1+127"),
        a_pair("sink", "sink", 0.002, 0.01, "0+128", "1+127", text="news.txt"),
    )
    assert lost == (
        "Without its sink (0+128), sink differs from 1+127 unevenly: on book.txt it loses 0.900 nats (95% "
        "interval 0.890 to 0.910), on news.txt it shows no measurable difference: +0.002 nats (95% interval "
        "-0.008 to +0.012)."
    )


def test_verdict_is_about_the_greatest_length() -> None:
    sentences = findings.verdict_sentences(example_results())
    assert "(0+64)" in sentences[0]
    assert "+32)" not in " ".join(sentences)


def many_models(*deltas: float) -> tuple[dict[str, Any], ...]:
    return tuple(a_model(f"m{number}", tokens_seen=None) for number in range(len(deltas)))


def test_verdict_counts_and_names_extremes_where_models_are_many() -> None:
    deltas = [0.0, 0.3, 0.1, 0.2]
    evicted = [
        a_pair(f"m{number}", f"m{number}", delta, 0.01, "0+128", "1+127")
        for number, delta in enumerate(deltas)
    ]
    lost, *_ = verdict_of(*evicted, models=many_models(*deltas))
    assert lost == (
        "Without their first tokens (0+128), 3 of 4 models lose measurably, from 0.100 nats (95% interval "
        "0.090 to 0.110) for m2 to 0.300 nats (95% interval 0.290 to 0.310) for m1, which the slots that "
        "they need repair."
    )
    alone = [*evicted[:2], *(pair | {"delta_nats": 0.0, "ci95": [-0.1, 0.1]} for pair in evicted[2:])]
    assert verdict_of(*alone, models=many_models(*deltas))[0] == (
        "Without their first tokens (0+128), only m1 of 4 models loses measurably: 0.300 nats (95% interval "
        "0.290 to 0.310), which one slot repairs."
    )
    none = [pair | {"delta_nats": 0.0, "ci95": [-0.1, 0.1]} for pair in evicted]
    assert verdict_of(*none, models=many_models(*deltas))[0] == (
        "Without their first tokens (0+128), none of 4 models loses measurably."
    )


# -- the verdict: which is better -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "words", "advice"),
    [
        (
            -0.012,
            "sink is better than vanilla by 0.012 nats (95% interval 0.004 to 0.020",
            "sink with its one slot streams better than vanilla with 4 slots",
        ),
        (
            0.012,
            "sink is worse than vanilla by 0.012 nats (95% interval 0.004 to 0.020",
            "sink with its one slot streams worse than vanilla with 4 slots",
        ),
        (
            0.001,
            "sink shows no measurable difference from vanilla: +0.001 nats (95% interval -0.007 to +0.009",
            "sink with its one slot streams as well as vanilla with 4 slots, as far as this could tell",
        ),
    ],
)
def test_verdict_compares_models_where_each_keeps_what_it_needs(
    delta: float, words: str, advice: str
) -> None:
    both_four = a_pair("sink", "vanilla", 0.5, 0.008, "4+124")
    own = a_pair("sink", "vanilla", delta, 0.008, "1+127", "4+124")
    expected = [
        f"As each is usually streamed (sink 1+127, vanilla 4+124), {words}{NOTE}).",
        f"For a team: {advice}{SURE}",
    ]
    assert verdict_of(both_four, own) == expected
    assert verdict_of(flipped(own), both_four) == expected


def test_verdict_falls_back_to_one_layout_that_keeps_what_both_need() -> None:
    of_one = a_pair("sink", "vanilla", 0.5, 0.008, "1+127")
    better, advice = verdict_of(of_one, a_pair("sink", "vanilla", -0.012, 0.008, "4+124"))
    assert better == (
        "Where both keep 4+124, sink is better than vanilla by 0.012 nats "
        f"(95% interval 0.004 to 0.020{NOTE})."
    )
    assert advice == f"For a team: sink with 4 slots kept streams better than vanilla with 4 slots{SURE}"
    better, advice = verdict_of(of_one)
    assert better.startswith("Where both keep 1+127, sink is worse than vanilla by 0.500 nats")
    assert advice == f"For a team: sink with its one slot streams worse than vanilla with one slot{SURE}"


@pytest.mark.parametrize(
    ("eviction", "half", "words"),
    [
        (0.9, 0.01, "sink needs its one slot, and with it streams better"),
        (0.019, 0.01, "sink gains by its one slot, and with it streams better"),
        (0.0, 0.009, "sink shows no need of its one slot, and with it streams better"),
        (0.0, 0.01, "sink may need its one slot or not, and with it streams better"),
        (-0.5, 0.01, "sink streams better here without its one slot, and with it streams better"),
    ],
)
def test_advice_tells_whether_the_sink_model_needs_its_slot(eviction: float, half: float, words: str) -> None:
    *_, advice = verdict_of(
        a_pair("sink", "sink", eviction, half, "0+128", "1+127"),
        a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124"),
    )
    assert advice.startswith(f"For a team: {words}")
    assert advice.endswith(f"streams better than vanilla with 4 slots{SURE}")


def test_advice_in_a_shared_layout_keeps_the_need_apart() -> None:
    both_four = a_pair("sink", "vanilla", 0.012, 0.008, "4+124")
    *_, advice = verdict_of(a_pair("sink", "sink", 0.9, 0.01, "0+128", "1+127"), both_four)
    assert advice == (
        "For a team: sink needs its one slot, and with 4 slots kept streams worse than vanilla with 4 slots"
        + SURE
    )


def test_advice_for_one_model_whose_texts_disagree_claims_nothing() -> None:
    *_, advice = verdict_of(
        a_pair("sink", "sink", 0.9, 0.01, "0+128", "1+127"),
        a_pair("sink", "sink", 0.0, 0.01, "0+128", "1+127", text="news.txt"),
        models=(a_model("sink", 1),),
    )
    assert advice == "For a team: whether sink needs its one slot differs from case to case."


def test_verdict_on_texts_that_disagree_prefers_no_model() -> None:
    better, advice = verdict_of(
        a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124"),
        a_pair("sink", "vanilla", 0.012, 0.008, "1+127", "4+124", text="news.txt"),
    )
    assert "sink against vanilla differs unevenly: on book.txt better by 0.012 nats" in better
    assert ", on news.txt worse by 0.012 nats" in better
    assert advice.endswith(f"streams better or worse than vanilla with 4 slots from case to case{SURE}")


def test_verdict_speaks_of_arms_and_never_of_one_seed_where_there_are_rows_over_seeds() -> None:
    models = tuple(
        a_model(f"{arm}-{seed}", sinks, arm=arm, seed=seed)
        for seed in (1, 2, 3)
        for arm, sinks in (("vanilla", 0), ("sink", 1))
    )
    sentences = verdict_of(
        a_pair("sink-1", "vanilla-1", 0.4, 0.008, "1+127", "4+124"),
        over_seeds(a_pair("sink", "sink", 0.9, 0.01, "0+128", "1+127")),
        over_seeds(a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124")),
        models=models,
    )
    assert sentences == [
        "Without its sink (0+128), sink loses 0.900 nats (95% interval 0.890 to 0.910 over 3 seeds), which "
        "its slot (1+127) repairs.",
        "As each is usually streamed (sink 1+127, vanilla 4+124), sink is better than vanilla by 0.012 "
        "nats (95% interval 0.004 to 0.020 over 3 seeds).",
        "For a team: sink needs its one slot, and with it streams better than vanilla with 4 slots.",
    ]
    no_difference = over_seeds(a_pair("sink", "vanilla", -0.001, 0.008, "1+127", "4+124"))
    assert "no measurable difference from vanilla: -0.001 nats" in verdict_of(no_difference, models=models)[0]


def test_verdict_takes_evictions_model_by_model_where_only_arms_are_paired_over_seeds() -> None:
    models = tuple(
        a_model(f"{arm}-{seed}", sinks, arm=arm, seed=seed)
        for seed in (1, 2)
        for arm, sinks in (("vanilla", 0), ("sink", 1))
    )
    between = over_seeds(a_pair("sink", "vanilla", -0.012, 0.008, "1+127", "4+124"))
    first, second = (
        a_pair(f"sink-{seed}", f"sink-{seed}", delta, 0.01, "0+128", "1+127")
        for seed, delta in ((1, 0.9), (2, 0.8))
    )
    lost, *_ = verdict_of(between, first, second, models=models)
    assert lost == (
        "Without its sink (0+128), sink loses 0.800 to 0.900 nats (2 models, each 95% interval clear of "
        "zero), which its slot (1+127) repairs."
    )
    lost, *_ = verdict_of(between, first, second | {"ci95": [-0.1, 1.7]}, models=models)
    assert "with sink-1 it loses 0.900 nats" in lost
    assert "with sink-2 it shows no measurable difference: +0.800 nats" in lost


def test_a_model_outside_the_arms_is_compared_with_each_of_their_models() -> None:
    models = (
        *(a_model(f"vanilla-{seed}", arm="vanilla", seed=seed) for seed in (1, 2)),
        a_model("lone", 1, arm=None),
    )
    pairs = [
        over_seeds(a_pair("vanilla", "vanilla", 0.08, 0.01, "0+128", "1+127")),
        a_pair("vanilla-2", "vanilla-1", 0.02, 0.008, "4+124"),
        a_pair("lone", "vanilla-1", -0.012, 0.008, "1+127", "4+124"),
        a_pair("lone", "vanilla-2", -0.030, 0.008, "1+127", "4+124"),
    ]
    lost, better, advice = verdict_of(*pairs, models=models)
    assert lost.startswith("Without its first tokens (0+128), vanilla loses 0.080 nats")
    assert better == (
        "As each is usually streamed (lone 1+127, vanilla 4+124), lone is better than vanilla by 0.012 to "
        "0.030 nats (2 models, each 95% interval over text clear of zero; not over seeds)."
    )
    assert advice == "For a team: lone with its one slot streams better than vanilla with 4 slots."
    results = some_results(*models) | {"paired": pairs}
    assert main_pairs(results, "book.txt") == [pairs[0], *pairs[2:]]
    lines = terminal_table(results).splitlines()
    assert "95% intervals over 3 seeds or text" in " ".join(lines)
    assert any(line.split()[-2:] == ["text", "lone"] for line in lines)


def test_verdict_compares_different_tokenizers_in_bits_per_byte_without_a_winner() -> None:
    models = (a_model("vanilla"), a_model("sink", 1, tokenizer="cd" * 32))
    results = some_results(*models)
    results["paired"] = [pair for pair in results["paired"] if pair["a"] == pair["b"]]
    better, advice = findings.verdict_sentences(results)[1:]
    assert better == (
        "The tokenizers of sink and vanilla differ, so their losses are not paired: in bits per byte, "
        "without an interval and so without a winner, sink takes 0.852 (1+127) and vanilla 0.852 (4+124)."
    )
    assert "streams better" not in advice
    results["perplexity"] += [{**row, "text": "news.txt"} for row in results["perplexity"]]
    assert findings.verdict_sentences(results)[1].endswith(
        "sink takes 0.852 (1+127) and vanilla 0.852 (4+124) on book.txt, "
        "sink takes 0.852 (1+127) and vanilla 0.852 (4+124) on news.txt."
    )
    for row in results["perplexity"]:
        row["bits_per_byte"] = None
    assert findings.verdict_sentences(results)[1] == (
        "The tokenizers of sink and vanilla differ, so their losses are not paired, "
        "and bits per byte are not known for both."
    )


def test_verdict_says_that_models_were_not_compared_where_no_row_does(results: Results) -> None:
    results["paired"] = [a_pair("sink", "vanilla", -0.5, 0.01, "0+128")]
    assert findings.verdict_sentences(results) == [
        "No measured row compares sink and vanilla as each is usually streamed."
    ]


@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["models", "arms"])
def test_many_are_first_shown_beside_the_base_alone(seeds: tuple[int, ...]) -> None:
    """The base is the vanilla one, wherever it stands."""
    arms = ["zero", "vanilla", "token", "gate", "logit"]
    of_seeds = len(seeds) > 1
    models = [
        a_model(f"{arm}-{seed}" if of_seeds else arm, int(arm == "token"), arm=arm, seed=seed)
        for arm in arms
        for seed in seeds
    ]
    for model in models:
        model["sink"]["kind"] = "none" if model["arm"] == "vanilla" else model["arm"]
    pairs = [a_pair(b, a, 0.1, 0.01, "4+124") for a, b in combinations(arms, 2)]
    pairs += [a_pair(arm, arm, 0.1, 0.01, "0+128", "1+127") for arm in arms]
    results = some_results(*models) | {"paired": list(map(over_seeds, pairs)) if of_seeds else pairs}
    main = [(pair["a"], pair["b"]) for pair in main_pairs(results, "book.txt")]
    assert {frozenset(pair) for pair in main} == {
        *(frozenset((arm, "vanilla")) for arm in arms),
        *(frozenset((arm,)) for arm in arms),
    }
    assert len(difference_table(results, "book.txt").rows) == len(pairs)
    fewer = {**results, "models": [model for model in models if model["arm"] != "logit"]}
    fewer["paired"] = [pair for pair in results["paired"] if "logit" not in (pair["a"], pair["b"])]
    assert main_pairs(fewer, "book.txt") == fewer["paired"]


def test_verdict_counts_contests_where_models_are_many() -> None:
    deltas = [0.0, -0.2, -0.1, 0.1, 0.0, 0.3]
    names = [f"m{number}" for number in range(len(deltas))]
    against = [
        a_pair(name, "m0", delta, 0.01, "4+124")
        for name, delta in zip(names[1:-1], deltas[1:-1], strict=True)
    ]
    better, advice = verdict_of(*against, models=many_models(*deltas))
    assert better == (
        "Against m0, each as it is usually streamed: 2 of 5 models are measurably better, 1 of 5 models "
        "measurably worse, 1 of 5 models show no measurable difference, 1 was not compared with it."
    )
    assert advice == f"For a team: m1 and m2 stream better than m0; m3 streams worse than m0{SURE}"
    alike = [pair | {"delta_nats": 0.0, "ci95": [-0.1, 0.1]} for pair in against]
    assert verdict_of(*alike, models=many_models(*deltas))[1] == (
        f"For a team: nothing measured here prefers another model to m0 or m0 to another{SURE}"
    )


@settings(max_examples=60, deadline=None)
@given(
    delta=st.floats(-1, 1, allow_nan=False),
    half=st.floats(0, 1, allow_nan=False),
    seeds=st.booleans(),
)
def test_verdict_names_a_winner_only_where_the_interval_leaves_zero_out(
    delta: float, half: float, seeds: bool
) -> None:
    pair = a_pair("sink", "vanilla", delta, half, "1+127", "4+124")
    better, advice = verdict_of(over_seeds(pair) if seeds else pair)
    low, high = pair["ci95"]
    words = "better" if high < 0 else "worse" if low > 0 else "no measurable difference"
    for other in ("is better", "is worse", "no measurable difference"):
        assert (other.removeprefix("is ") == words) == (other in better)
    assert ("as well as" in advice) == (words == "no measurable difference")
    assert ("one seed" in better) != seeds


# -- the verdict: memory, failures, form ------------------------------------------------------------


def answers(near: float, far: float, task: str = "access", chance: float = 0.25) -> list[dict[str, Any]]:
    """Accuracy 20 tokens back, within the window, and 300 back, beyond it; intervals of 0.04 each way."""
    setting = {"model": "sink", "task": task, **a_layout("1+127"), "num_queries": 400, "chance": chance}
    return [
        setting
        | {"distance_lines": lines, "distance_tokens": tokens, "accuracy": share}
        | {"ci95": [share - 0.04, share + 0.04]}
        for lines, tokens, share in ((1, 20.0, near), (15, 300.0, far))
    ]


def test_verdict_says_that_streaming_is_not_memory_where_answers_fall_to_chance(results: Results) -> None:
    never_learnt = answers(0.02, 0.01, "streameval", 0.01)
    results["streameval"] = never_learnt + answers(0.86, 0.26)
    assert findings.verdict_sentences(results)[-1].endswith(
        "; streaming is not memory: sink at 1+127 answers 86% of queries within its window and 26% beyond "
        "it, where chance is 25%."
    )


@pytest.mark.parametrize(
    ("near", "far"),
    [(0.27, 0.25), (0.86, 0.4), (0.30, 0.24)],
    ids=["never above chance", "above chance beyond the window", "no measured fall"],
)
def test_verdict_says_nothing_of_memory_where_answers_do_not_show_it(
    results: Results, near: float, far: float
) -> None:
    results["streameval"] = answers(near, far)
    assert "memory" not in " ".join(findings.verdict_sentences(results))
    results["streameval"] = [*answers(0.86, 0.26)[:1]]
    assert "memory" not in " ".join(findings.verdict_sentences(results))


def test_models_that_failed_are_named_everywhere(results: Results) -> None:
    results["failed"] = [{"model": "cut", "error": "ModelError: too\nshort"}]
    assert findings.verdict_sentences(results)[-1].endswith("; cut could not be measured.")
    words = "cut could not be measured: ModelError: too?short"
    assert findings.failures(results) == [words]
    assert words in results_markdown(results)
    assert words in terminal_table(results)


def test_verdict_of_nothing_says_so() -> None:
    assert verdict_of() == ["No measured row compares sink and vanilla as each is usually streamed."]
    assert verdict_of(models=(a_model("vanilla"),)) == ["No differences were measured."]
    assert findings.verdict_sentences(some_results()) == ["No differences were measured."]


@pytest.mark.parametrize(
    "options", [{}, {"seeds": True}, {"texts": ("a.txt", "b.txt")}], ids=["one", "seeds", "texts"]
)
def test_verdict_is_at_most_three_whole_sentences(options: dict[str, Any]) -> None:
    sentences = findings.verdict_sentences(example_results(**options))
    assert len(sentences) == 3
    for sentence in sentences:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not re.search(r"\.\s|None|\{|;;", sentence)


# -- findings and limits ----------------------------------------------------------------------------


def test_headline_tells_what_eviction_costs_and_which_model_is_better(results: Results) -> None:
    assert findings.headline(results) == [
        "Without its first token (0+128), vanilla shows no measurable difference from 1+127: "
        "+0.001 nats (95% interval -0.009 to +0.011).",
        "Without its sink (0+128), sink loses 0.150 nats to 1+127 (95% interval 0.140 to 0.160).",
        "At 1+127, sink is better than vanilla by 0.012 nats (95% interval 0.004 to 0.020).",
    ]


def test_headline_claims_no_winner_when_the_interval_holds_zero(results: Results) -> None:
    results["paired"] = [a_pair("sink", "vanilla", 0.001, 0.003)]
    assert findings.headline(results) == [
        "At 1+127, sink shows no measurable difference from vanilla: "
        "+0.001 nats (95% interval -0.002 to +0.004)."
    ]


def test_headline_can_find_the_sink_worse_and_eviction_a_gain(results: Results) -> None:
    results["paired"] = [
        a_pair("sink", "sink", -0.02, 0.01, "0+128", "1+127"),
        a_pair("sink", "vanilla", 0.02, 0.01),
    ]
    assert findings.headline(results) == [
        "Without its sink (0+128), sink gains 0.020 nats on 1+127 (95% interval 0.010 to 0.030).",
        "At 1+127, sink is worse than vanilla by 0.020 nats (95% interval 0.010 to 0.030).",
    ]


def test_headline_compares_models_where_both_keep_their_sinks() -> None:
    results = some_results(a_model("vanilla"), a_model("four", 4))
    results["paired"] = [
        a_pair("four", "four", 0.3, 0.01, "0+128", "1+127"),
        a_pair("four", "four", 0.4, 0.01, "0+128", "4+124"),
        a_pair("four", "vanilla", 0.2, 0.01, "1+127"),
        a_pair("four", "vanilla", -0.2, 0.01, "4+124"),
    ]
    evicted, compared = findings.headline(results)
    assert evicted.startswith("Without its sinks (0+128), four loses 0.400 nats to 4+124")
    assert compared.startswith("At 4+124, four is better than vanilla by 0.200 nats")


def test_headline_speaks_of_arms_where_there_are_rows_over_seeds() -> None:
    headline = findings.headline(example_results(seeds=True))
    assert len(headline) == 4
    assert not re.search("seed[123]", " ".join(headline))


def test_headline_and_terminal_name_the_text_when_there_are_several(results: Results) -> None:
    other = some_results(a_model("vanilla"), text="news.txt")
    for name in ("perplexity", "paired", "position_loss"):
        results[name] += other[name]
    headline = findings.headline(results)
    assert headline[0].startswith("On book.txt: Without its first token")
    assert headline[-1].startswith("On news.txt: Without its first token")
    assert "news.txt: perplexity" in terminal_table(results)


def test_limits_say_what_intervals_do_not_cover(results: Results) -> None:
    one_text, over_text, young = findings.limits(results)
    assert "book.txt" in one_text
    assert "do not cover the training seed" in over_text
    assert "less than a billion tokens" in young


@pytest.mark.parametrize(("count", "words"), [(1, "one document"), (29, "29 documents"), (30, None)])
def test_few_documents_are_told_wherever_intervals_over_text_stand(
    results: Results, count: int, words: str | None
) -> None:
    for row in results["perplexity"]:
        row["documents_scored"] = count
    told = f", from {words}: intervals are too narrow" if words else ""
    assert findings.tokens_scored(results["perplexity"]) == f"8,064 tokens scored{told}"
    said = [sentence for sentence in findings.limits(results) if "82 to 87 times at 10" in sentence]
    assert [sentence.partition(": ")[0] for sentence in said] == (
        [f"The tokens scored of book.txt come from {words}"] if words else []
    )


def test_limits_do_not_complain_of_what_was_done(results: Results) -> None:
    results["models"] = [a_model("vanilla", tokens_seen=None), a_model("sink", 1, tokens_seen=4_000_000_000)]
    results["paired"].append(over_seeds(a_pair("sink", "vanilla", -0.01, 0.02)))
    assert findings.limits(results)[1:] == [
        "Intervals over seeds cover the training seed, on this very text, and no other text."
    ]
    results["paired"][-1]["num_seeds"] = 2
    assert findings.limits(results)[-1].startswith("An interval over two seeds reaches 13 standard errors")


def test_many_differences_are_said_to_miss_now_and_then(results: Results) -> None:
    [pair] = results["paired"][:1]
    results["paired"] = [pair] * 20
    assert "one in twenty" not in " ".join(findings.limits(results))
    results["paired"] = [pair] * 21
    assert "21 differences were measured, and one in twenty 95% intervals misses" in " ".join(
        findings.limits(results)
    )


def test_a_model_that_saw_no_token_is_young(results: Results) -> None:
    results["models"] = [a_model("vanilla", tokens_seen=0)]
    assert "less than a billion tokens" in findings.limits(results)[-1]


def test_limits_refuse_losses_of_different_tokenizers(results: Results) -> None:
    results["models"][0]["tokenizer"] = "cd" * 32
    assert "only bits per byte" in findings.limits(results)[-1]


# -- tables -----------------------------------------------------------------------------------------


def test_paper_table_is_the_papers_and_says_where_it_stands() -> None:
    table = paper_table()
    assert table.header[1:5] == ["0+1024", "1+1023", "2+1022", "4+1020"]
    assert table.rows[0] == ["vanilla", "27.87", "18.49", "18.05", "18.05", "+0.410", "+0.434"]
    assert table.rows[2][1:5] == ["1,235", "18.01", "18.01", "18.02"]
    assert table.rows[2][5] == "+4.228"
    assert [row[0] for row in table.rows] == list(PERPLEXITIES)
    for words in ("2309.17453", "Table 3", "Table 10", "160m", "75B tokens", "one PG19 book", "one seed"):
        assert words in CITATION


def test_difference_table_shows_each_seed() -> None:
    pair = over_seeds(a_pair("sink", "vanilla", -0.012, 0.008))
    results = some_results(a_model("vanilla"), a_model("sink", 1))
    results["paired"] = [pair]
    (row,) = difference_table(results, "book.txt").rows
    assert row[4] == "seeds (-0.013, -0.012, -0.011)"
    assert row[-1] == "sink is better"


def test_difference_table_does_without_the_differences_of_unlike_seeds(results: Results) -> None:
    results["paired"] = [over_seeds(a_pair("sink", "vanilla", -0.012, 0.008)) | {"deltas": []}]
    assert difference_table(results, "book.txt").rows[0][4] == "3 seeds"


def test_rows_that_score_other_tokens_are_said_to(results: Results) -> None:
    recomputed = results["perplexity"][0] | {"policy": "recompute", "tokens_scored": 500}
    assert findings.tokens_scored([*results["perplexity"], recomputed]) == (
        "8,064 tokens scored, but recompute 500: compare it by its differences"
    )


def test_own_rows_are_the_longest_in_the_layout_of_a_verdict(example: Results) -> None:
    own = own_rows(example, example["perplexity"])
    assert [(row["model"], wording.layout_name(row)) for row in own] == [
        ("vanilla", "4+60"),
        ("vanilla", "recompute 64"),
        ("vanilla", "dense"),
        ("sink", "1+63"),
        ("sink", "recompute 64"),
        ("sink", "dense"),
    ]
    without = [row for row in example["perplexity"] if wording.layout_name(row) not in ("4+60", "1+63")]
    layouts = [wording.layout_name(row) for row in own_rows(example, without)]
    assert layouts.count("2+62") == 2
    assert layouts.count("4+60") == 0


def test_removal_table_says_what_was_changed_and_whether_it_mattered(example: Results) -> None:
    rows = removal_table(example, "book.txt").rows
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("vanilla", "first token removed", "dense", "loses"),
        ("vanilla", "4 kept tokens made line breaks", "4+60", "no measurable difference"),
        ("sink", "first token removed", "dense", "loses"),
        ("sink", "kept token made a line break", "1+63", "loses"),
    ]
    assert rows[2][5:7] == ["+1.840", "+1.800 to +1.880"]
    assert removal_table(example, "other.txt").rows == []


def test_sink_table_has_each_sink_and_the_first_text_token_beside_the_untrained(example: Results) -> None:
    table = sink_table(example)
    assert [row[:2] for row in table.rows] == [
        ["vanilla", "first text token"],
        ["sink", "sink"],
        ["sink", "first text token (1)"],
    ]
    heads = [
        head for head in example["sink_attention"] if head["model"] == "sink" and head["weights"] == "trained"
    ]
    mean = sum(head["mass"][0] for head in heads) / len(heads)
    strongest = max(heads, key=lambda head: head["mass"][0])
    assert table.rows[1][3:7] == ["0%", "64 x 100", f"{100 * mean:.0f}%", "6.0%"]
    assert f"(layer {strongest['layer']}, head {strongest['head']})" in table.rows[1][7]
    assert table.rows[1][8:] == ["0%", "0%", "128 x 16"]


def test_sink_table_does_without_attention_and_without_initial_weights(example: Results) -> None:
    trained = [row for row in example["sink_metric"] if row["weights"] == "trained"]
    rows = sink_table({**example, "sink_metric": trained, "sink_attention": []}).rows
    assert len(rows) == 3
    assert rows[0][3:] == ["", "64 x 100", "", "", "", "", "", ""]


@pytest.fixture
def kinds() -> Results:
    """A model whose null slot takes attention and one whose gate has only a proxy of that, beside vanilla."""
    return example_results(arms=("vanilla", "zero", "gate"))


def test_sink_table_has_the_null_slot_and_marks_the_proxy_of_a_gate(kinds: Results) -> None:
    table = sink_table(kinds)
    assert [row[:2] for row in table.rows] == [
        ["vanilla", "first text token"],
        ["zero", "null slot"],
        ["zero", "first text token"],
        ["gate", "first text token"],
    ]
    of_slot = next(row["value"] for row in kinds["sink_metric"] if row["position"] == -1)
    assert table.rows[1][2:4] == [f"{100 * of_slot:.0f}%", "0%"]
    assert table.rows[1][5:8] == ["31%", "4.0%", "31% (layer 0, head 0)"]
    assert [row[8:10] for row in table.rows] == [["0%", "0%"], *2 * [["31%", "4.0%"]], ["62%*", "50%*"]]


def test_a_proxy_is_explained_on_page_in_markdown_and_on_terminal_and_only_there(kinds: Results) -> None:
    line = (
        "null mass (attention on no token; *: a proxy, 1 - the mean factor of outputs): zero 31% (untrained "
        "4.0%), gate 62%* (untrained 50%*)"
    )
    assert line in terminal_table(kinds, width=1000)
    assert "A proxy: the weights of this kind" in results_markdown(kinds)
    assert PROXY_NOTE in html.unescape(report_page(kinds))
    vanilla = example_results()
    assert "null mass" not in terminal_table(vanilla)
    assert "A proxy" not in results_markdown(vanilla) + report_page(vanilla)


def test_results_of_an_older_version_have_no_proxy(example: Results) -> None:
    for row in example["sink_attention"]:
        del row["null_mass_is_proxy"]
    assert [row[8] for row in sink_table(example).rows] == 3 * ["0%"]


def test_terminal_tells_the_metric_of_a_null_slot_as_such(kinds: Results) -> None:
    [line] = [line for line in terminal_table(kinds, width=1000).splitlines() if "sink metric" in line]
    assert re.search(
        r": vanilla \S+ \(untrained 0%\), zero \d+% on its null slot \(untrained 0%\), gate", line
    )


def test_models_are_told_with_what_their_kind_is(kinds: Results) -> None:
    words = [row[1] for row in model_table({"models": [*kinds["models"], a_model("sink", 2)]}).rows]
    assert words == [
        "none",
        "zero: what zero is, in a clause",
        "gate: what gate is, in a clause",
        "2 tokens (id 500, 501)",
    ]
    del kinds["models"][1]["sink_about"]  # of an older version
    assert model_table(kinds).rows[1][1] == "zero"


def test_verdict_speaks_of_a_kind_without_tokens_as_of_vanilla(kinds: Results) -> None:
    """It has no slot of its own: it streams with four first tokens, and the null slot is in every layout."""
    sentences = " ".join(findings.verdict_sentences(kinds))
    assert "without its first tokens (0+64), zero loses" in sentences
    assert "nats" in sentences
    assert "Where both keep 4+60, zero is worse than vanilla by" in sentences
    assert "where both keep 4+60, gate is better than vanilla by" in sentences
    assert "zero with 4 slots kept streams worse than vanilla with 4 slots" in sentences
    assert not re.search(r"(zero|gate) (needs|shows no need of) its|its sinks?\b|its one slot", sentences)


def test_norms_table_has_a_row_for_each_layer_with_the_untrained_in_brackets(example: Results) -> None:
    table = norms_table(example)
    assert [row[:2] for row in table.rows] == [
        [model, str(layer)] for model in ("vanilla", "sink") for layer in range(3)
    ]
    last = next(
        row
        for row in example["norms"]
        if (row["model"], row["weights"], row["layer"]) == ("sink", "trained", 2)
    )
    assert table.rows[-1][3] == f"{last['hidden_norm_ratio']:.2f} (1.00)"
    assert len(table.rows[-1]) == len(table.header)


def test_streameval_table_leaves_a_distance_that_was_not_asked_empty(example: Results) -> None:
    results = {**example, "streameval": example["streameval"][:-1]}
    table = streameval_table(results)
    assert len(table.rows) == 2 * 2 * 3
    assert table.header[4:] == ["one line", "2 lines", "4 lines", "8 lines", "16 lines"]
    assert table.rows[0][:5] == ["streameval", "vanilla", "4+60", "1.0%", "84% (78% to 88%)"]
    assert table.rows[-1][-1] == ""


def test_latency_table_has_one_row_for_dense_whose_window_grows(example: Results) -> None:
    table = latency_table(example)
    assert [row[1] for row in table.rows[:4]] == ["4+60", "4+28", "dense", "recompute 64"]
    assert table.header[3:7] == ["at 256, ms", "at 1,024, ms", "at 4,096, ms", "at 16,384, ms"]
    dense, recompute = table.rows[2], table.rows[3]
    assert all(re.fullmatch(r"[\d.]+ \(p95 [\d.]+\)", cell) for cell in dense[3:7])
    assert dense[7:9] == ["33.6 MB", "43.0 MB"]
    assert recompute[7] == ""


def test_verified_table_has_every_check(example: Results) -> None:
    table = verified_table(example)
    assert len(table.rows) == len(example["verified"])
    first = example["verified"][0]
    assert table.rows[0][4:] == [f"{first['max_logit_diff']:.1e}", "float32"]


def test_recompute_rows_of_several_lengths_have_columns_of_their_own(example: Results) -> None:
    table = perplexity_table(example, "book.txt")
    assert table.header[-3:] == ["recompute 32", "recompute 64", "dense"]
    assert all(all(row) for row in table.rows)


# -- on the terminal --------------------------------------------------------------------------------


def test_terminal_table_has_a_row_per_model_and_a_column_per_layout(results: Results) -> None:
    lines = terminal_table(results, width=100).splitlines()
    assert lines[0].startswith("book.txt: perplexity (8,064 tokens scored)")
    assert lines[2].split() == ["model", *LAYOUTS]
    assert lines[3].split() == ["vanilla", "9.98", "9.97", "9.97", "9.97", "9.97"]
    assert lines[4].split()[0] == "2.289-2.313"
    assert lines[5].split()[:2] == ["sink", "11.59"]
    assert " ".join(" ".join(lines).split()).endswith(" ".join(findings.verdict_sentences(results)))
    lines = lines[: lines.index("", 12)]
    last = "sink - vanilla 1+127 -0.012 -0.020 to -0.004 sink"
    assert " ".join(lines[-1].split()) == last
    assert lines[-3].endswith("  none")


def test_terminal_table_goes_on_below_where_the_terminal_is_narrow(results: Results) -> None:
    table = terminal_table(results, width=40)
    assert max(len(line) for line in table.splitlines()) <= 40
    assert [line.split()[1:] for line in table.splitlines() if line.startswith("model")] == [
        LAYOUTS[:2],
        LAYOUTS[2:4],
        LAYOUTS[4:],
    ]
    words = " ".join(table.split())
    assert "sink - vanilla at 1+127: -0.012 nats (95% interval -0.020 to -0.004, over text)" in words


@pytest.mark.parametrize("seeds", [False, True])
def test_terminal_table_fits_80_columns_and_has_a_line_for_everything(seeds: bool) -> None:
    table = terminal_table(example_results(seeds=seeds), width=80)
    assert max(len(line) for line in table.splitlines()) <= 80
    words = " ".join(table.split())
    for start in (
        f"95% intervals over {'3 seeds' if seeds else 'text'}",
        f"{226 if seeds else 13} more differences in results.json",
        "sink metric (heads above 0.3, 64 tokens): vanilla",
        "first tokens removed, nats: vanilla",
        "kept tokens made line breaks, nats: vanilla",
        "streameval (chance 1.0%): vanilla",
        "access (chance 25%): vanilla",
        "ms a token at 16,384: vanilla",
        "blockwise against token by token, float32: largest logit difference",
        "half-written could not be measured",
    ):
        assert start in words
    assert ("2 more in results.json" in words) == seeds


def test_terminal_table_shows_the_worst_check(example: Results) -> None:
    results = {**example, "verified": [dict(row) for row in example["verified"]]}
    results["verified"][5]["max_logit_diff"] = 0.125
    assert "difference 1.2e-01 (vanilla, 1+63, 256 tokens; 16 checks)" in " ".join(
        terminal_table(results).split()
    )


def test_different_tokenizers_are_shown_in_bits_per_byte(results: Results) -> None:
    results["models"][0]["tokenizer"] = "cd" * 32
    lines = terminal_table(results, width=200).splitlines()
    assert lines[0].endswith("; below it perplexities, which can't be compared")
    assert lines[0].startswith("book.txt: bits per byte, as tokenizers differ")
    assert lines[3].split()[:2] == ["vanilla", f"{2.301 / 2.7:.4f}"]
    markdown = results_markdown(results)
    assert "Bits per byte, as the models' tokenizers differ" in markdown
    assert f"| vanilla | {2.301 / 2.7:.4f} |" in markdown


# -- results.md -------------------------------------------------------------------------------------


def test_a_layout_that_one_model_lacks_leaves_its_cell_empty(results: Results) -> None:
    del results["perplexity"][-1]
    row = next(line for line in results_markdown(results).splitlines() if line.startswith("| sink | 11.59"))
    assert row.endswith("|  |")


@pytest.mark.parametrize("seeds", [False, True])
def test_markdown_tables_are_whole_and_folds_are_closed(seeds: bool) -> None:
    results = example_results(seeds=seeds)
    results["models"][0]["source"] = HOSTILE
    markdown = results_markdown(results)
    found = re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE)
    assert len(found) >= 12
    for table in found:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<script" not in markdown.replace("\\<", "")
    depth = 0
    for mark in re.findall(r"</?details>", markdown):
        depth += 1 if mark == "<details>" else -1
        assert depth in (0, 1)
    assert depth == 0


def test_markdown_begins_with_the_verdict_and_holds_every_kind_of_table(example: Results) -> None:
    markdown = results_markdown(example)
    first = findings.verdict_sentences(example)[0]
    assert markdown.startswith(f"# Streaming comparison\n\n{first}")
    for heading in (
        "## Not measured",
        "## Perplexity on book.txt",
        "### Differences in loss",
        "### Without the first tokens",
        "<summary>The paper's own figures</summary>\n\nStreamingLLM, arXiv 2309.17453",
        "## Sinks inside the models",
        "<summary>Norms and outliers by layer</summary>",
        "## Answers from the stream",
        "## Time and memory",
        "<summary>Blockwise evaluation checked against stepping token by token</summary>",
        "## Limits",
        "<summary>Environment</summary>",
    ):
        assert heading in markdown


def test_markdown_fits_a_pull_request_and_says_what_it_left_out() -> None:
    results = example_results(texts=("a.txt", "b.txt"), seeds=True)
    markdown = results_markdown(results)
    assert len(markdown) < 65_536
    assert "more in results.json." in markdown
    main = main_pairs(results, "a.txt")
    assert {pair["interval"] for pair in main} == {"seeds"}
    assert {wording.num_slots(side) for pair in main for side in wording.sides(pair)} == {64, 4096}


# -- all together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [(0,), (0, 1), (0, 1, 4)], ids=["one", "two", "three"])
def test_every_model_and_layout_appears_on_page_in_markdown_and_on_terminal(sinks: tuple[int, ...]) -> None:
    results = some_results(*(a_model(f"arm{count}", count) for count in sinks))
    for shown in (report_page(results), results_markdown(results), terminal_table(results)):
        for expected in (*(f"arm{count}" for count in sinks), *LAYOUTS):
            assert expected in shown


def test_names_from_results_are_printed_without_control_characters() -> None:
    results = some_results(a_model(HOSTILE, source=HOSTILE, arm=HOSTILE), a_model("sink", 1), text=HOSTILE)
    results["environment"] = {HOSTILE: HOSTILE}
    results["failed"] = [{"model": HOSTILE, "error": HOSTILE}]
    written = [report_page(results), results_markdown(results), terminal_table(results)]
    for shown in (*written, *findings.verdict_sentences(results), *findings.headline(results)):
        assert "\x1b" not in shown


def test_empty_lists_leave_no_heading(results: Results) -> None:
    results["paired"], results["position_loss"], results["environment"] = [], [], {}
    markdown = results_markdown(results)
    for heading in (
        "Differences in loss",
        "Environment",
        "first tokens",
        "Sinks",
        "Answers",
        "Time",
        "checked",
    ):
        assert f"# {heading}" not in markdown
        assert f"<summary>{heading}" not in markdown
    assert "difference in loss" not in terminal_table(results)
    assert findings.headline(results) == ["No differences were measured."]
    results["perplexity"] = []
    assert "Perplexity on" not in results_markdown(results)
    assert terminal_table(results) == ""


def test_report_files_are_written_and_numbers_are_not_rounded(example: Results, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "compare"
    write_report(example, out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json", "results.md"]
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == example
    assert (out / "results.md").read_text(encoding="utf-8") == results_markdown(example)
    assert (out / "report.html").read_text(encoding="utf-8") == report_page(example)
    assert (out / "report.html").stat().st_size < 6_000_000
    check_report_folder(out)


def test_a_number_that_json_cannot_say_leaves_the_old_report_alone(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    results["perplexity"][0]["loss_nats"] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(results, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_folder_with_other_things_is_not_written_to(tmp_path: Path) -> None:
    check_report_folder(tmp_path / "new")
    check_report_folder(tmp_path)
    (tmp_path / "results.json").write_text('{"of": "another program"}', encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        check_report_folder(tmp_path)
    assert str(error.value) == (
        f"--out {tmp_path} holds something that is not a report; choose another folder"
    )
