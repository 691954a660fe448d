"""The page in a real browser without a network: all plots drawn at any width, in light and dark."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Tab, chromium, find_chromium
from example_results import example_results

from sinktrain.report.figures import every_figure
from sinktrain.report.page import report_page
from sinktrain.report.style import DARK, LIGHT

Results = dict[str, Any]

DONE = "document.documentElement.dataset.plots"
STATES = "[...document.querySelectorAll('.plot')].map(plot => plot.dataset.drawn)"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
TOO_WIDE = """[...document.querySelectorAll('.plot')].filter(
    plot => plot.querySelector('.main-svg').getBoundingClientRect().width > plot.clientWidth + 0.5).length"""
NARROWER = """[...document.querySelectorAll('.plot')].filter(
    plot => plot.querySelector('.main-svg').getBoundingClientRect().width < plot.clientWidth - 0.5).length"""
TICK_COLOUR = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
FIRST_CELL = "document.querySelector('.plot .hm image').href.baseVal"
PRINT = "dispatchEvent(new Event('beforeprint'))"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with chromium(binary) as opened:
        yield opened


@pytest.fixture(scope="module")
def results() -> Results:
    return example_results()


def only(results: Results, *lists: str) -> Results:
    """The results with nothing measured but some lists."""
    kept = {"models", "environment", *lists}
    return {name: rows if name in kept or isinstance(rows, int) else [] for name, rows in results.items()}


def written(folder: Path, results: Results) -> Path:
    page = folder / "report.html"
    page.write_text(report_page(results), encoding="utf-8")
    return page


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


def check_drawn(tab: Tab, num_figures: int) -> None:
    """All plots are drawn, none is wider than its column, and the browser has nothing to complain of."""
    tab.wait_for(DONE)
    assert tab.evaluate(STATES) == ["true"] * num_figures
    assert tab.evaluate("document.querySelectorAll('svg.main-svg').length") >= num_figures
    assert tab.evaluate(OVERFLOW) <= 0
    assert tab.evaluate(TOO_WIDE) == tab.evaluate(NARROWER) == 0
    assert tab.complaints == []
    assert {url.split(":")[0] for url in tab.requests} <= {"file", "data"}


def check_picture(tab: Tab, path: Path, width: int) -> None:
    tab.picture(path)
    picture = path.read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (width, tab.evaluate("document.body.offsetHeight"))
    assert len(picture) > 50_000


@pytest.mark.slow
def test_all_plots_are_drawn_offline_wide_and_narrow_light_and_dark_without_a_word_in_the_console(
    tab: Tab, results: Results, tmp_path: Path
) -> None:
    """The page is opened once and then changed, as by a turned telephone whose evening begins."""
    num_figures = len(list(every_figure(results)))
    tab.open(written(tmp_path, results), 1280)
    check_drawn(tab, num_figures)
    assert tab.evaluate(TICK_COLOUR) == rgb(LIGHT["ink"])
    check_picture(tab, tmp_path / "wide.png", 1280)
    light_cells = tab.evaluate(FIRST_CELL)
    tab.resize(390)
    tab.set_scheme("dark")
    tab.wait_for(f"{TICK_COLOUR} === '{rgb(DARK['ink'])}' && {TOO_WIDE} + {NARROWER} === 0")
    check_drawn(tab, num_figures)
    assert tab.evaluate(FIRST_CELL) != light_cells
    check_picture(tab, tmp_path / "narrow.png", 390)


@pytest.mark.slow
def test_legends_of_a_whole_study_leave_room_for_its_plots_on_a_telephone(tab: Tab, tmp_path: Path) -> None:
    """A legend higher than its plot once left no room to draw in, and plotly gave up."""
    study = only(example_results(seeds=True), "sink_metric", "removal")
    tab.open(written(tmp_path, study), 390)
    check_drawn(tab, len(list(every_figure(study))))


@pytest.mark.slow
def test_print_has_every_plot_at_once_on_light_paper(tab: Tab, results: Results, tmp_path: Path) -> None:
    few = only(results, "perplexity", "sink_attention")
    tab.open(written(tmp_path, few), 1280, scheme="dark")
    tab.evaluate(PRINT)
    assert tab.evaluate(STATES) == ["true"] * len(list(every_figure(few)))
    assert tab.evaluate(TICK_COLOUR) == rgb(LIGHT["ink"])
    assert tab.complaints == []


@pytest.mark.slow
def test_a_plot_that_fails_says_so_alone_and_the_policy_lets_no_foreign_script_run(
    tab: Tab, results: Results, tmp_path: Path
) -> None:
    page = written(tmp_path, only(results, "perplexity", "sink_metric"))
    html = page.read_text(encoding="utf-8").replace('data-figure="loss', 'data-broken="', 1)
    html = html.replace("</main>", "<script>window.wasRun = 1</script></main>")
    page.write_text(html, encoding="utf-8")
    tab.open(page, 800)
    tab.wait_for(DONE)
    assert tab.evaluate(STATES) == ["failed", "true"]
    assert "could not be drawn; its numbers stand below" in tab.evaluate("document.body.textContent")
    assert tab.evaluate("window.wasRun") is None
    assert len(tab.complaints) == 2
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
