"""The page: every number in its plots is one of results.json, and nothing runs or is fetched but our own."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import example_results as example
import pytest

from sinktrain.report.figures import all_figures, every_figure
from sinktrain.report.figures.look import DASHES, NUM_COLOURS, SYMBOLS, TEMPLATE, Look
from sinktrain.report.figures.numbers import figure_table
from sinktrain.report.figures.spec import Figure, log_axis
from sinktrain.report.page import report_page
from sinktrain.report.style import DARK, LIGHT, STYLE

Results = dict[str, Any]
Spec = dict[str, Any]

HOSTILE = '</script><script>alert("1")</script><b>%{x}&amp;\n\x1b[31m'
VOID_TAGS = {"meta"}
PLOTTED_LISTS = {
    "perplexity": "Perplexity on",
    "paired": "Differences on",
    "position_loss": "Loss by position on",
    "removal": "Removal and replacement",
    "quantized": "Quantisation",
    "sink_metric": "The sink metric",
    "sink_attention": "Attention by layer and head",
    "norms": "Sizes by layer",
    "streameval": "What a stream remembers",
    "latency": "Time and memory",
    "training": "Training",
}


class Page(HTMLParser):
    """Collects tags, attributes, headings, scripts and shown text; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.figures: dict[str, Spec] = {}
        self.scripts: list[str] = []
        self.headings: list[str] = []
        self.words = ""
        self._script: dict[str, str | None] = {}
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in {"h2", "h3"}:
            self.headings.append("")
        if tag == "script":
            self._script = dict(attrs)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags[-1:] == ["script"]:
            if "data-figure" in self._script:
                name = self._script["data-figure"]
                assert name is not None
                assert name not in self.figures
                self.figures[name] = json.loads(data)
            elif "data-template" not in self._script:
                self.scripts.append(data)
        elif self.open_tags[-1:] != ["style"]:
            self.words += data
            if self.open_tags[-1:] in (["h2"], ["h3"]):
                self.headings[-1] += data


def looked_up(results: Results, meta: Spec, field: str | None) -> list[Any] | None:
    """What the named rows hold, found by a plain walk over the JSON."""
    if field is None:
        return None
    found: list[Any] = []
    for number in meta["rows"]:
        row = results[meta["list"]][number]
        if "+" in field:
            value = sum(row[part] for part in field.split("+"))
        elif "." in field:
            name, entry = field.split(".")
            value = row[name][int(entry)]
        else:
            value = row[field]
        found += value if isinstance(value, list) else [value]
    return found


def check_trace(results: Results, trace: Spec) -> int:
    """Compare every number of a trace with its rows; gives how many there were."""
    meta = trace["meta"]
    if trace["type"] == "heatmap":
        cells = [
            (x, y, z)
            for y, line in zip(trace["y"], trace["z"], strict=True)
            for x, z in zip(trace["x"], line, strict=True)
            if z is not None
        ]
        for place, field in enumerate((meta["x"], meta["y"], meta["z"])):
            assert [cell[place] for cell in cells] == looked_up(results, meta, field)
        if "customdata" in trace:
            tops = [top for line in trace["customdata"] for top in line if top is not None]
            assert tops == looked_up(results, meta, meta["customdata"])
        return len(cells)
    numbers = 0
    for axis in "xy":
        expected = looked_up(results, meta, meta.get(axis))
        if expected is None:
            assert all(isinstance(value, str) for value in trace[axis])
        else:
            sign = meta["sign"] if meta[axis] == "delta_nats" else 1
            assert trace[axis] == [sign * value for value in expected]
            numbers += len(expected)
    along = "y" if "error_y" in trace else "x"
    assert ("low" in meta) == ("customdata" in trace) == (f"error_{along}" in trace)
    if "low" in meta:
        values, sign = trace[along], meta["sign"]
        lows, highs = (
            values if field is None else [sign * value for value in looked_up(results, meta, field) or []]
            for field in ((meta["low"], meta["high"]) if sign > 0 else (meta["high"], meta["low"]))
        )
        assert trace["customdata"] == [list(ends) for ends in zip(lows, highs, strict=True)]
        error = trace[f"error_{along}"]
        assert error["array"] == [high - value for high, value in zip(highs, values, strict=True)]
        assert error["arrayminus"] == [value - low for low, value in zip(lows, values, strict=True)]
        assert all(size >= 0 for size in (*error["array"], *error["arrayminus"]))
    return numbers


def check_marks(results: Results, layout: Spec) -> int:
    shapes, metas = layout.get("shapes", []), layout.get("meta", {}).get("shapes", [])
    for shape, meta in zip(shapes, metas, strict=True):
        assert set(looked_up(results, meta, meta["x"]) or []) == {shape["x0"]} == {shape["x1"]}
        assert shape["label"]["text"] in ("", f"{shape['x0']:,}")
    return len(shapes)


def check_figures(results: Results, figures: dict[str, Spec]) -> int:
    return sum(
        check_marks(results, spec["layout"]) + sum(check_trace(results, trace) for trace in spec["data"])
        for spec in figures.values()
    )


@pytest.fixture(scope="module")
def results() -> Results:
    return example.example_results()


@pytest.fixture(scope="module")
def page(results: Results) -> Page:
    return Page(report_page(results))


def named(results: Results, start: str) -> list[Figure]:
    return [figure for figure in every_figure(results) if figure.name.startswith(start)]


# -- every number is traceable ----------------------------------------------------------------------


@pytest.mark.parametrize("texts", [["book.txt"], ["a.txt", "b.txt"]], ids=["one-text", "two-texts"])
@pytest.mark.parametrize("seeds", [False, True], ids=["one-seed", "three-seeds"])
def test_every_plotted_number_stands_in_the_row_that_its_trace_names(texts: list[str], seeds: bool) -> None:
    results = example.example_results(texts, seeds)
    figures = Page(report_page(results)).figures
    assert check_figures(json.loads(json.dumps(results)), figures) > 3000
    used = {trace["meta"]["list"] for spec in figures.values() for trace in spec["data"]}
    assert used == set(PLOTTED_LISTS)


@pytest.mark.parametrize("list_name", PLOTTED_LISTS)
def test_a_number_changed_in_the_results_is_missed_in_the_plots(
    results: Results, page: Page, list_name: str
) -> None:
    fields = {"sink_attention": "value_norm_ratio", "sink_metric": "value", "streameval": "accuracy"}
    fields |= {"latency": "ms_per_token_p50", "norms": "kurtosis", "perplexity": "loss_nats"}
    changed = copy.deepcopy(results)
    row, field = changed[list_name][0], fields.get(list_name, "delta_nats")
    if list_name in ("position_loss", "training"):
        values = row["loss_nats" if list_name == "position_loss" else "value"]
        values[2] = math.nextafter(values[2], 9.0)
    else:
        row[field] = math.nextafter(row[field], 9.0)
    with pytest.raises(AssertionError):
        check_figures(changed, page.figures)


def test_the_page_holds_each_figure_once_and_plotly_accepts_them_all(results: Results, page: Page) -> None:
    import plotly.graph_objects as go

    assert list(page.figures) == [figure.name for figure in every_figure(results)]
    for name, spec in all_figures(results).items():
        assert spec["data"] != [], name
        go.Figure(spec)
    assert "var(--" not in json.dumps(all_figures(results))
    for spec in page.figures.values():
        go.Figure({"data": spec["data"], "layout": {**spec["layout"], "template": TEMPLATE}})


def test_every_number_of_a_plot_stands_in_its_table_too(results: Results, page: Page) -> None:
    for figure in every_figure(results):
        table = figure_table(figure)
        assert {len(row) for row in table.rows} == {len(table.header)}
        cells = {part for row in table.rows for cell in row[1:] for part in (cell, *cell.split(" to "))}
        cells |= {row[0] for row in table.rows}
        for trace in figure.traces:
            values = [*trace["x"], *trace["y"], *(z for line in trace.get("z", ()) for z in line)]
            if trace["type"] == "scatter":
                values += [end for ends in trace.get("customdata", ()) for end in ends]
            else:
                values = values[len(trace["x"]) + len(trace["y"]) :]
            for value in values:
                shown = value if isinstance(value, str) else f"{value:,}"
                assert shown in cells or f"{value:,.5g}" in cells, (figure.name, value)
    assert page.words.count("Numbers") == len(page.figures)


# -- what is drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", PLOTTED_LISTS)
def test_an_empty_list_leaves_its_section_out(results: Results, page: Page, empty: str) -> None:
    without = Page(report_page({**results, empty: []}))
    heading = PLOTTED_LISTS[empty]
    assert any(words.startswith(heading) for words in page.headings)
    assert not any(words.startswith(heading) for words in without.headings)
    check_figures({**results, empty: []}, without.figures)


def test_without_anything_to_draw_the_page_holds_no_script(results: Results) -> None:
    bare = {**results, **{name: [] for name in PLOTTED_LISTS}}
    html = report_page(bare)
    assert "script" not in Page(html).tags
    assert "script-src" not in html
    assert len(html) < 30_000


def test_gaps_are_losses_above_the_layout_without_first_tokens_whichever_side_it_stands_on(
    results: Results,
) -> None:
    """Pairs kept - 0+N are drawn as they are, pairs 0+N - kept the other way round."""

    def pair(a: int, b: int, delta: float) -> Spec:
        sides = {"sinks": a, "window": 64 - a, "a_sinks": a, "a_window": 64 - a, "b_sinks": b}
        numbers = {"delta_nats": delta, "ci95": [delta - 0.01, delta + 0.02], "p": 0.01}
        names = {"a": "sink", "b": "sink", "text": "book.txt", "policy": "streaming", "interval": "text"}
        return {**names, **sides, "b_window": 64 - b, **numbers}

    chosen = {**results, "paired": [pair(0, 1, 0.5), pair(0, 4, 0.75), pair(2, 0, -0.625)]}
    (figure,) = named(chosen, "gap")
    points = {
        x: (y, ends)
        for trace in figure.traces
        for x, y, ends in zip(trace["x"], trace["y"], trace["customdata"], strict=True)
    }
    assert points == {
        1: (-0.5, [-0.52, -0.49]),
        4: (-0.75, [-0.77, -0.74]),
        2: (-0.625, [-0.635, -0.605]),
    }
    assert figure.layout["yaxis"]["title"]["text"] == "nats above 0+N"


def test_panels_of_a_study_are_of_one_seed_of_each_arm_and_the_page_says_so() -> None:
    results = example.example_results(seeds=True)
    models = {figure.name.split("/")[2] for figure in named(results, "position")}
    assert models == {"vanilla-seed1", "sink-seed1"}
    assert "One seed of each arm; all are in results.json." in Page(report_page(results)).words
    assert {figure.name.split("/")[2] for figure in named(results, "seeds")} == {
        "vanilla",
        "sink",
        "sink - vanilla",
    }


def test_models_of_one_arm_that_are_no_seeds_of_it_all_get_panels(results: Results) -> None:
    alike = {**results, "models": [{**model, "arm": "sink"} for model in results["models"]]}
    assert {figure.name.split("/")[2] for figure in named(alike, "position")} == {"vanilla", "sink"}


def test_models_of_different_tokenizers_are_drawn_in_bits_per_byte(results: Results) -> None:
    vanilla, sink = results["models"]
    chosen = {**results, "models": [vanilla, {**sink, "tokenizer": "cd" * 32}]}
    (figure,) = named(chosen, "loss")
    assert {trace["meta"]["x"] for trace in figure.traces} == {"bits_per_byte"}
    assert "bits per byte, as tokenizers differ" in Page(report_page(chosen)).words


def test_eviction_is_marked_where_each_length_ends(results: Results) -> None:
    marked = {
        figure.name: [shape["x0"] for shape in figure.layout["shapes"]]
        for figure in named(results, "position")
    }
    assert marked == {
        f"position/book.txt/{model}/{length}": [length]
        for model in ("vanilla", "sink")
        for length in (32, 64)
    }


def test_accuracy_has_its_chance_line_and_the_windows_marked(results: Results) -> None:
    (figure,) = named(results, "recall/access/sink")
    chance = figure.traces[-1]
    assert (chance["name"], set(chance["y"])) == ("chance", {0.25})
    assert [shape["x0"] for shape in figure.layout["shapes"]] == [63, 31]


def test_marks_too_near_to_one_another_show_one_number(results: Results) -> None:
    rows = [dict(row) for row in results["streameval"] if row["policy"] == "streaming"]
    for number, row in enumerate(rows):
        row |= {"sinks": (0, 1, 4, 2)[number % 4], "window": (64, 63, 28, 62)[number % 4]}
    figure, *_ = named({**results, "streameval": rows}, "recall")
    labels = {shape["x0"]: shape["label"]["text"] for shape in figure.layout["shapes"]}
    assert labels == {64: "64", 63: "", 62: "", 28: "28"}


def test_logarithmic_axes_have_as_many_numbers_as_there_is_room_for() -> None:
    def ticks(*values: float) -> object:
        return log_axis("", [{"x": values}], "x").get("dtick")

    assert [ticks(3.0, 5.0), ticks(3.0, 90.0), ticks(3.0, 9e6), ticks(0.0)] == [None, "D2", 1, None]


def test_heat_maps_leave_unmeasured_heads_empty_and_show_null_mass_where_there_is_any(
    results: Results,
) -> None:
    rows = [dict(row) for row in results["sink_attention"] if (row["layer"], row["head"]) != (1, 0)]
    for row in rows:
        row["null_mass"] = 0.125 if row["model"] == "vanilla" else 0.0
    chosen = {**results, "sink_attention": rows}
    assert len(named(chosen, "heat/vanilla/null_mass")) == 1
    assert named(chosen, "heat/sink/null_mass") == []
    (figure,) = named(chosen, "heat/sink/sink_mass")
    assert [trace["name"] for trace in figure.traces] == ["trained", "initial weights"]
    assert figure.traces[0]["z"][1][0] is None
    check_figures(chosen, Page(report_page(chosen)).figures)


def test_a_null_slot_is_a_star_in_front_of_the_first_position_and_a_proxy_is_called_so() -> None:
    results = example.example_results(arms=("vanilla", "zero", "gate"))
    (figure,) = named(results, "sink-metric")
    starts = {trace["name"]: (trace["x"][0], trace["marker"]["symbol"][0]) for trace in figure.traces}
    assert starts["zero, trained"] == (-1, "star")
    assert starts["zero, initial weights"] == (-1, "star-open")
    assert starts["vanilla, trained"] == (0, "circle")
    assert figure.layout["xaxis"]["range"][0] < -1
    for model, words in (
        ("zero", "attention on the null slot"),
        ("gate", "null mass*, a proxy: 1 - the mean"),
    ):
        (of_null,) = named(results, f"heat/{model}/null_mass")
        assert of_null.caption.startswith(f"{model}: {words}")
    page = report_page(results)
    assert "At -1, the null slot of a model that has one." in page
    check_figures(results, Page(page).figures)


def test_time_by_cache_size_takes_each_setting_at_its_longest_stream(results: Results) -> None:
    (figure,) = named(results, "cost/cache-size")
    rows = [results["latency"][number] for trace in figure.traces for number in trace["meta"]["rows"]]
    assert {row["stream_pos"] for row in rows} == {16384}
    assert {row["policy"] for row in rows} == {"streaming", "recompute"}


def test_equal_losses_without_spread_and_single_points_can_be_drawn(results: Results) -> None:
    chosen = copy.deepcopy(results)
    for row in chosen["perplexity"]:
        row |= {"loss_nats": 2.0, "ci95": [2.0, 2.0]}
    for row in chosen["position_loss"]:
        row |= {"stream_pos": [64.0], "loss_nats": [2.0]}
    for pair in chosen["paired"]:
        pair |= {"delta_nats": 0.0, "ci95": [0.0, 0.0]}
    for row in chosen["norms"]:
        row["kurtosis"] = 0.0
    for figure in every_figure(chosen):
        for axis in (figure.layout["xaxis"], figure.layout["yaxis"]):
            low, high = axis.get("range", (0, 1))
            assert low != high
    check_figures(chosen, Page(report_page(chosen)).figures)


# -- the page is safe, small and whole --------------------------------------------------------------


def test_only_our_two_scripts_may_run_and_nothing_may_be_fetched(results: Results, page: Page) -> None:
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()) for script in page.scripts]
    assert len(digests) == 2
    assert rules["script-src"] == " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    assert not {"link", "img", "iframe", "object", "form", "base"} & set(page.tags)
    assert not {"src", "onclick", "onload", "srcdoc"} & {name for name, _ in page.attributes}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"https?:|url\(|@import", STYLE + page.scripts[1] + json.dumps(page.figures))


def test_names_from_results_are_shown_and_never_run() -> None:
    text = json.dumps(example.example_results([HOSTILE]))
    results = json.loads(
        text.replace('"sink"', json.dumps(HOSTILE)).replace(f"{json.dumps(HOSTILE)}:", '"sink":')
    )
    page = Page(report_page(results))
    assert len(page.scripts) == 2
    assert "b" not in page.tags
    assert HOSTILE.splitlines()[0] in page.words
    for spec in page.figures.values():
        for trace in spec["data"]:
            assert "<" not in trace["name"]
    assert "\x1b" not in page.words
    assert check_figures(results, page.figures) > 1000


def test_every_section_can_be_reached_and_every_table_and_plot_has_a_label(page: Page) -> None:
    ids = [value for name, value in page.attributes if name == "id"]
    assert [f"#{name}" for name in ids] == [value for name, value in page.attributes if name == "href"]
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == page.tags.count("table") + len(page.figures)
    assert all(labels)
    assert page.tags.count("h1") == 1


def test_the_page_ends_with_how_it_was_measured_and_the_command_to_repeat_it(
    results: Results, page: Page
) -> None:
    assert results["environment"]["command"] in page.words
    assert "half-written could not be measured" in page.words
    assert page.headings[-1] == "Environment"


def test_a_study_of_a_160m_model_stays_below_six_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "NUM_LAYERS", 12)
    monkeypatch.setattr(example, "NUM_HEADS", 12)
    html = report_page(example.example_results(["a.txt", "b.txt"], seeds=True))
    assert len(html.encode()) < 6_000_000


# -- colours ----------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_series_stand_out_from_the_paper(palette: dict[str, str]) -> None:
    assert contrast(palette["ink"], palette["paper"]) > 7
    assert contrast(palette["soft"], palette["paper"]) > 4.5
    for series in range(NUM_COLOURS):
        assert contrast(palette[f"s{series}"], palette["paper"]) > 3


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_heat_maps_can_be_read_by_lightness_alone(palette: dict[str, str]) -> None:
    heat = [contrast(palette[f"h{step}"], palette["paper"]) for step in range(5)]
    assert heat == sorted(heat)
    arms = [contrast(palette[f"d{step}"], palette["paper"]) for step in range(5)]
    assert arms[:3] == sorted(arms[:3], reverse=True)
    assert arms[2:] == sorted(arms[2:])


def test_series_differ_without_colour_and_none_looks_like_another() -> None:
    first = [Look.of(series) for series in range(NUM_COLOURS)]
    assert {look.symbol for look in first} == set(SYMBOLS)
    assert {look.dash for look in first} == set(DASHES)
    assert len({Look.of(series) for series in range(NUM_COLOURS**2)}) == NUM_COLOURS**2


def test_every_colour_that_a_plot_names_is_known_in_light_and_dark(results: Results) -> None:
    specs = [figure.spec() for figure in every_figure(results)]
    used = set(re.findall(r"var\(--(\w+)\)", json.dumps([specs, TEMPLATE]) + STYLE))
    assert used <= set(LIGHT) == set(DARK)
