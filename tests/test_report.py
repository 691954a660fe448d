"""The report: words that fit the numbers, tables that hold every row, a page that stands alone."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sinktrain.report import findings
from sinktrain.report.page import report_page
from sinktrain.report.tables import results_markdown, terminal_table
from sinktrain.report.write import write_report

LAYOUTS = ["0+128", "1+127", "2+126", "4+124", "dense"]
HOSTILE = '<script>alert("1")</script>|_x_\n\x1b[31m'
VOID_TAGS = {"meta", "line", "circle", "polyline"}


def a_model(name: str, sinks: int = 0, **changes: Any) -> dict[str, Any]:
    kind = "token" if sinks else "none"
    sink = {"kind": kind, "count": sinks, "token_ids": list(range(500, 500 + sinks))}
    model = {"name": name, "source": f"runs/{name}", "parameters": 1_104_384, "sink": sink}
    return {**model, "tokens_seen": 500_000, "seed": 1, "arm": name, **changes}


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


def some_results(*models: dict[str, Any], text: str = "book.txt") -> dict[str, Any]:
    """Results of some models in all layouts; a model with a sink loses 0.15 nats at 0+128."""
    results: dict[str, Any] = {
        "schema_version": 1,
        "environment": {"device": "cpu", "versions": {"torch": "2.13"}},
    }
    later = ("latency", "sink_metric", "sink_attention", "norms", "removal", "streameval", "quantized")
    results |= {name: [] for name in ("perplexity", "paired", "position_loss", *later)}
    results["models"] = list(models)
    for model in models:
        loses_sink = 0.15 if model["sink"]["count"] else 0.001
        for layout in LAYOUTS:
            loss = 2.3 + loses_sink * (layout == "0+128")
            where = {"model": model["name"], "text": text, **a_layout(layout)}
            numbers = {"tokens_scored": 8064, "loss_nats": loss, "perplexity": math.exp(loss)}
            numbers |= {"bits_per_byte": None, "ci95": [loss - 0.0123, loss + 0.0123]}
            results["perplexity"].append(where | numbers)
            results["position_loss"].append(where | {"stream_pos": [64.0, 192.0], "loss_nats": [2.5, loss]})
        name = model["name"]
        results["paired"].append(a_pair(name, name, loses_sink, 0.01, "0+128", "1+127", text=text))
    for first, second in pairwise(models):
        results["paired"].append(a_pair(second["name"], first["name"], -0.012, 0.008, text=text))
    return results


@pytest.fixture
def results() -> dict[str, Any]:
    return some_results(a_model("vanilla"), a_model("sink", 1))


class Page(HTMLParser):
    """Collects tags, attributes and shown text; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags[-1:] != ["style"]:
            self.words += data


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (
            a_pair("sink", "vanilla", -0.012, 0.008),
            "sink - vanilla at 1+127: -0.012 nats (95% interval -0.020 to -0.004, over text)",
        ),
        (
            a_pair("sink", "vanilla", 0.012, 0.008, "dense", interval="seeds"),
            "sink - vanilla, dense: +0.012 nats (95% interval +0.004 to +0.020, over seeds)",
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
    ],
)
def test_difference_words_say_sign_interval_and_zero(pair: dict[str, Any], words: str) -> None:
    assert findings.difference_words(pair) == words


def test_an_interval_that_touches_zero_shows_no_difference() -> None:
    assert not findings.is_measurable(a_pair("a", "b", 0.004, 0.004))


def test_a_bound_beside_zero_is_never_rounded_to_zero() -> None:
    words = findings.difference_words(a_pair("a", "b", -0.01, 0.00996))
    assert "-0.01996 to -0.00004" in words


def test_verdict_names_the_one_with_less_loss() -> None:
    assert findings.verdict(a_pair("sink", "vanilla", -0.012, 0.008)) == "sink is better"
    assert findings.verdict(a_pair("sink", "vanilla", 0.012, 0.008)) == "vanilla is better"
    assert findings.verdict(a_pair("sink", "sink", 0.15, 0.01, "0+128", "1+127")) == "1+127 is better"
    assert findings.verdict(a_pair("sink", "vanilla", 0.0, 0.008)) == "no measurable difference"


@pytest.mark.parametrize(
    ("perplexity", "shown"), [(9.916, "9.92"), (123.45, "123.5"), (29214.2, "29,214"), (1.23e9, "1.2e+09")]
)
def test_perplexities_of_any_size_are_short(perplexity: float, shown: str) -> None:
    assert findings.perplexity_text(perplexity) == shown


def test_headline_tells_what_eviction_costs_and_which_model_is_better(results: dict[str, Any]) -> None:
    assert findings.headline(results) == [
        "Without its first token (0+128), vanilla shows no measurable difference from 1+127: "
        "+0.001 nats (95% interval -0.009 to +0.011).",
        "Without its sink (0+128), sink loses 0.150 nats to 1+127 (95% interval 0.140 to 0.160).",
        "At 1+127, sink is better than vanilla by 0.012 nats (95% interval 0.004 to 0.020).",
    ]


def test_headline_claims_no_winner_when_the_interval_holds_zero(results: dict[str, Any]) -> None:
    results["paired"] = [a_pair("sink", "vanilla", 0.001, 0.003)]
    assert findings.headline(results) == [
        "At 1+127, sink shows no measurable difference from vanilla: "
        "+0.001 nats (95% interval -0.002 to +0.004)."
    ]


def test_headline_can_find_the_sink_worse_and_eviction_a_gain(results: dict[str, Any]) -> None:
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


def test_headline_names_the_text_when_there_are_several(results: dict[str, Any]) -> None:
    other = some_results(a_model("vanilla"), text="news.txt")
    for name in ("perplexity", "paired", "position_loss"):
        results[name] += other[name]
    headline = findings.headline(results)
    assert headline[0].startswith("On book.txt: Without its first token")
    assert headline[-1].startswith("On news.txt: Without its first token")
    assert report_page(results).count("<h2>Perplexity on ") == 2
    assert "news.txt: perplexity" in terminal_table(results)


def test_limits_say_what_intervals_do_not_cover(results: dict[str, Any]) -> None:
    one_text, over_text, young = findings.limits(results)
    assert "book.txt" in one_text
    assert "do not cover the training seed" in over_text
    assert "less than a billion tokens" in young


def test_limits_do_not_complain_of_what_was_done(results: dict[str, Any]) -> None:
    results["models"] = [a_model("vanilla", tokens_seen=None), a_model("sink", 1, tokens_seen=4_000_000_000)]
    results["paired"].append(a_pair("sink", "vanilla", -0.01, 0.02, interval="seeds"))
    assert len(findings.limits(results)) == 1


def test_terminal_table_has_a_row_per_model_and_a_column_per_layout(results: dict[str, Any]) -> None:
    lines = terminal_table(results, width=100).splitlines()
    assert lines[0].startswith("book.txt: perplexity (8,064 tokens scored)")
    assert lines[2].split() == ["model", *LAYOUTS]
    assert lines[3].split() == ["vanilla", "9.98", "9.97", "9.97", "9.97", "9.97"]
    assert lines[4].split()[0] == "2.289-2.313"
    assert lines[5].split()[:2] == ["sink", "11.59"]
    assert lines[-1] == "  sink - vanilla at 1+127: -0.012 nats (95% interval -0.020 to -0.004, over text)"


def test_terminal_table_goes_on_below_where_the_terminal_is_narrow(results: dict[str, Any]) -> None:
    table = terminal_table(results, width=40).split("\n\ndifference")[0]
    assert max(len(line) for line in table.splitlines()[1:]) <= 40
    assert [line.split()[1:] for line in table.splitlines() if line.startswith("model")] == [
        LAYOUTS[:2],
        LAYOUTS[2:4],
        LAYOUTS[4:],
    ]


def test_a_layout_that_one_model_lacks_leaves_its_cell_empty(results: dict[str, Any]) -> None:
    del results["perplexity"][-1]
    row = next(line for line in results_markdown(results).splitlines() if line.startswith("| sink | 11.59"))
    assert row.endswith("|  |")


def test_markdown_rows_have_as_many_cells_as_their_header() -> None:
    markdown = results_markdown(some_results(a_model(HOSTILE), a_model("sink", 1)))
    tables = re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<script" not in markdown.replace("\\<", "")


def test_page_is_well_formed_self_contained_and_readable_to_all(results: dict[str, Any]) -> None:
    html = report_page(results)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import|//", html)
    assert "title" in page.tags
    assert page.tags.count("svg") == 4 + len(LAYOUTS)
    assert html.count('role="img" aria-label="') == 4
    assert page.tags.count("table") == html.count('role="region" tabindex="0" aria-label="') == 5
    assert html.count('<th scope="col"') > 5
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("sinks", [(0,), (0, 1), (0, 1, 4)], ids=["one", "two", "three"])
def test_every_model_and_layout_appears_in_all_three(sinks: tuple[int, ...]) -> None:
    results = some_results(*(a_model(f"arm{count}", count) for count in sinks))
    page = Page(report_page(results))
    for shown in (page.words, results_markdown(results), terminal_table(results)):
        for expected in (*(f"arm{count}" for count in sinks), *LAYOUTS):
            assert expected in shown
    assert page.tags.count("polyline") == len(sinks) * len(LAYOUTS) + len(LAYOUTS)
    assert page.words.count("eviction from 128") == len(sinks)


def test_names_from_results_are_shown_and_never_run() -> None:
    results = some_results(a_model(HOSTILE, source=HOSTILE, arm=HOSTILE), a_model("sink", 1), text=HOSTILE)
    results["environment"] = {HOSTILE: HOSTILE}
    html = report_page(results)
    page = Page(html)
    assert "script" not in page.tags
    assert HOSTILE.splitlines()[0] in page.words
    assert "\x1b" not in html + results_markdown(results) + terminal_table(results)


def test_empty_lists_draw_nothing(results: dict[str, Any]) -> None:
    results["paired"], results["position_loss"], results["environment"] = [], [], {}
    html = report_page(results)
    assert Page(html).tags.count("svg") == 1
    assert "Loss by stream position" not in html
    assert "Differences in loss" not in html + results_markdown(results)
    assert "Environment" not in results_markdown(results)
    assert "difference in loss" not in terminal_table(results)
    assert findings.headline(results) == ["No differences were measured."]
    results["perplexity"] = []
    assert "svg" not in Page(report_page(results)).tags
    assert "Perplexity on" not in results_markdown(results)
    assert terminal_table(results) == ""


def test_equal_losses_without_spread_can_be_drawn(results: dict[str, Any]) -> None:
    for row in results["perplexity"]:
        row |= {"loss_nats": 2.0, "ci95": [2.0, 2.0]}
    for row in results["position_loss"]:
        row |= {"stream_pos": [64.0], "loss_nats": [2.0]}
    results["paired"] = [a_pair("sink", "vanilla", 0.0, 0.0)]
    Page(report_page(results))


def test_report_files_are_written_and_numbers_are_not_rounded(
    results: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "compare"
    write_report(results, out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json", "results.md"]
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert (out / "results.md").read_text(encoding="utf-8") == results_markdown(results)
    assert (out / "report.html").read_text(encoding="utf-8") == report_page(results)


def test_a_number_that_json_cannot_say_leaves_the_old_report_alone(
    results: dict[str, Any], tmp_path: Path
) -> None:
    write_report(results, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    results["perplexity"][0]["loss_nats"] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(results, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
