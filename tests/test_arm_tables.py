"""The tables with a row an arm, and of how runs went: what stands in their cells."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pytest
from example_results import example_results

from sinktrain.report.arm_tables import arm_table, rounding_table, seed_table
from sinktrain.report.markdown import results_markdown
from sinktrain.report.markup import table_html
from sinktrain.report.sections import sections
from sinktrain.report.table import Table
from sinktrain.report.training_tables import emergence_table, training_table

ARMS = ("vanilla", "sink", "zero", "gate")
RESULTS = example_results(seeds=True, arms=ARMS)
Row = dict[str, Any]


def cells(table: Table, first: str) -> dict[str, str]:
    """A row by the names of its columns."""
    [row] = [row for row in table.rows if row[0] == first]
    return dict(zip(table.header, row, strict=True))


def values(name: str, arm: str, key: str, **wanted: Any) -> list[float]:
    rows = [
        row
        for row in RESULTS[name]
        if row["model"].startswith(f"{arm}-seed") and wanted.items() <= row.items()
    ]
    assert len(rows) == 3
    return [row[key] for row in rows]


def reach(three: list[float]) -> float:
    """Half of the 95% interval of the mean of three: Student's t with two degrees of freedom is 4.3027."""
    return 4.3027 * stdev(three) / 3**0.5


def test_an_arms_row_is_the_mean_of_its_seeds() -> None:
    table = arm_table(RESULTS, "book.txt")
    assert [row[0] for row in table.rows] == list(ARMS)
    assert table.header == [
        "arm",
        "seeds",
        "0+64",
        "1+63",
        "2+62",
        "4+60",
        "dense",
        "sink metric",
        "of",
        "outliers",
        "without the first",
    ]
    sink = cells(table, "sink")
    assert sink["seeds"] == "3"
    for layout, wanted in {
        "0+64": {"policy": "streaming", "sinks": 0, "window": 64},
        "dense": {"policy": "dense"},
    }.items():
        losses = values("perplexity", "sink", "loss_nats", **wanted)
        told, half = map(float, sink[layout].split(" ± "))
        assert (told, half) == pytest.approx((fmean(losses), reach(losses)), abs=6e-4)


def test_the_sink_metric_is_that_of_own_sinks_or_the_null_slot_or_the_first_token() -> None:
    table = arm_table(RESULTS, "book.txt")
    assert [cells(table, arm)["of"] for arm in ARMS] == [
        "first text token",
        "sink",
        "null slot",
        "first text token",
    ]
    shares = values("sink_metric", "zero", "value", weights="trained", position=-1, eps=0.3)
    told, half = (float(text.removesuffix("%")) for text in cells(table, "zero")["sink metric"].split(" ± "))
    assert (told, half) == pytest.approx((100 * fmean(shares), 100 * reach(shares)), abs=0.6)


def test_models_without_further_seeds_stand_for_themselves() -> None:
    results = example_results()
    table = arm_table(results, "book.txt")
    assert [row[:2] for row in table.rows] == [["vanilla", "1"], ["sink", "1"]]
    assert not seed_table(results, "book.txt").rows
    assert "## Arms" not in results_markdown(results)


def test_outliers_are_those_of_each_models_worst_layer() -> None:
    found = cells(arm_table(RESULTS, "book.txt"), "sink")
    for name, key in {
        "outliers": "top1_over_median",
        "without the first": "top1_over_median_without_first",
    }.items():
        worst: dict[str, float] = {}
        for row in RESULTS["norms"]:
            if row["model"].startswith("sink-seed") and row["weights"] == "trained":
                worst[row["model"]] = max(worst.get(row["model"], 0.0), row[key])
        told, half = (float(text.replace(",", "")) for text in found[name].split(" ± "))
        assert (told, half) == pytest.approx((fmean(worst.values()), reach([*worst.values()])), abs=0.06)


def test_what_was_not_measured_is_an_empty_cell() -> None:
    bare = {**RESULTS, "norms": [], "sink_metric": [], "sink_attention": []}
    found = cells(arm_table(bare, "book.txt"), "sink")
    assert [found[name] for name in ("sink metric", "of", "outliers", "without the first")] == [""] * 4


def test_over_seeds_there_is_a_row_for_each_arm_and_layout_of_the_greatest_length() -> None:
    table = seed_table(RESULTS, "book.txt")
    assert len(table.rows) == len(ARMS) * 5
    row = next(row for row in RESULTS["arms"] if (row["arm"], row["sinks"], row["window"]) == ("gate", 0, 64))
    found = next(row for row in table.rows if row[:2] == ["gate", "0+64"])
    for text, ends in zip(found[5:], (row["ci95"], row["prediction95"]), strict=True):
        assert [float(end) for end in text.split(" to ")] == pytest.approx(ends, abs=5e-4)


def test_rounding_is_told_by_its_mean_and_interval_in_the_arms_own_layout() -> None:
    added = [
        row["delta_nats"]
        for row in RESULTS["quantized"]
        if (row["scheme"], row["sinks"], row["window"]) == ("kv4", 1, 63)
        and row["model"].startswith("sink-seed")
        and not row["sink_in_full_precision"]
    ]
    told = cells(rounding_table(RESULTS, "book.txt"), "sink")["kv4: all rounded"]
    assert told == f"{fmean(added):.4f} ± {reach(added):.4f}"


def curve(model: str, values: list[float], **facts: Any) -> Row:
    count = range(1, len(values) + 1)
    return {
        "model": model,
        "metric": "val/loss",
        "step": [100 * k for k in count],
        "tokens_seen": [1_000_000 * k for k in count],
        "train_seconds": [60.0 * k for k in count],
        "hardware": {"device": "H100", "num_devices": 1, "train_seconds": 60.0 * len(values)},
        "value": values,
    } | facts


def test_time_to_the_loss_that_all_reach_is_on_the_line_between_two_points() -> None:
    results = example_results()
    two = {"device": "H100", "num_devices": 2, "train_seconds": 120.0}
    results["training"] = [curve("vanilla", [4.0, 3.5]), curve("sink", [4.5, 3.0], hardware=two)]
    table = training_table(results)
    assert table.header[-2:] == ["tokens to 3.500", "minutes to 3.500"]
    assert table.rows[0] == ["vanilla", "1", "H100", "2.0M", "2.00", "3.500", "2.0M", "2.00"]
    assert table.rows[1] == ["sink", "1", "2 x H100", "2.0M", "2.00", "3.000", "1.7M", "1.67"]


def test_a_loss_that_a_run_had_from_its_first_measurement_is_told_from_there() -> None:
    results = example_results()
    results["training"] = [curve("vanilla", [4.0, 3.9]), curve("sink", [3.0, 2.9])]
    assert training_table(results).rows[1][-2:] == ["1.0M", "1.00"]


def test_results_that_tell_no_times_have_no_table_of_times() -> None:
    old = [
        {key: value for key, value in row.items() if key != "train_seconds"} for row in RESULTS["training"]
    ]
    assert not training_table({**RESULTS, "training": old}).rows


def test_a_long_curve_is_told_at_points_that_grow_by_a_factor_up_to_its_end() -> None:
    results = example_results()
    gap = [0.001 * k for k in range(64)]
    results["training"] = [curve(model, gap, metric="stream/gap") for model in ("vanilla", "sink")]
    table = emergence_table(results, "stream/gap")
    shown = [float(name.removesuffix("M")) for name in table.header[1:]]
    assert len(shown) <= 8
    assert (shown[0], shown[-1]) == (1, 64)
    assert table.rows[0][1:] == [f"{0.001 * (at - 1):+z.3f}" for at in shown]
    assert not emergence_table(results, "sink/metric").rows


def test_curves_without_a_common_point_have_no_table() -> None:
    results = example_results()
    other = curve("sink", [0.1, 0.2], metric="stream/gap", tokens_seen=[0, 5])
    results["training"] = [curve("vanilla", [0.1], metric="stream/gap"), other]
    assert not emergence_table(results, "stream/gap").rows
    results["training"] = [
        row | {"tokens_seen": [0, 9_000][: len(row["value"])]} for row in results["training"]
    ]
    assert not emergence_table(results, "stream/gap").rows


def test_losses_of_different_tokenizers_have_no_common_goal() -> None:
    results = example_results()
    results["training"] = [curve("vanilla", [4.0, 3.9]), curve("sink", [3.0, 2.9])]
    results["models"][1]["tokenizer"] = "0" * 64
    table = training_table(results)
    assert table.header[-1] == "held-out loss"
    assert [len(row) for row in table.rows] == [len(table.header)] * 2


def test_telemetry_stands_beside_the_text_that_it_read() -> None:
    results = example_results(texts=("a.txt", "b.txt"), seeds=True)
    assert arm_table(results, "a.txt").header[-1] == "without the first"
    assert arm_table(results, "b.txt").header[-1] == "dense"


def test_seeds_of_one_arm_are_one_row_though_nothing_pairs_them() -> None:
    alone = example_results(seeds=True, arms=("sink",)) | {"paired": []}
    assert [row[:2] for row in arm_table(alone, "book.txt").rows] == [["sink", "3"]]
    assert "## Arms on" in results_markdown(alone)


def test_page_and_markdown_show_them() -> None:
    headings = [heading for heading, _ in sections(RESULTS)]
    assert headings[0] == "Arms on book.txt"
    assert "Training" in headings
    markdown = results_markdown(RESULTS)
    assert markdown.count("| arm |") == 7
    assert markdown.index("## Arms on") < markdown.index("## Perplexity on") < markdown.index("## Training")


def test_on_the_page_what_follows_a_plus_minus_stands_below() -> None:
    table = Table(["arm", "loss"], [["a<b", "3.098 ± 0.028"], ["c", "2.996"]])
    page = table_html(table, "losses")
    assert "<td>3.098<small>± 0.028</small></td>" in page
    assert "<td>2.996</td>" in page
