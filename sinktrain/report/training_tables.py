"""Tables of how runs went: when they reached a loss that all reach, and what was measured by the way."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from statistics import fmean

from sinktrain.report.contests import Subject, subjects_of
from sinktrain.report.findings import has_one_tokenizer
from sinktrain.report.over_seeds import over_seeds_text
from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row, count_text, printable, share_text

NOTE = (
    "Minutes are those of the steps, on all devices at once, the first compilation included and validation "
    "left out; means over seeds, ± half of their 95% intervals. A run that went on elsewhere tells its last "
    "hardware."
)
CAPTIONS = {
    "val/loss": "Held-out loss, nats",
    "stream/gap": "Streaming gap, nats: what is lost without the first tokens",
    "sink/metric": "Sink metric of the first token",
    "sink/metric_null": "Sink metric of the null slot",
}
EMERGING = [metric for metric in CAPTIONS if metric != "val/loss"]
"""Of which a report has a table."""
SHOWN_POINTS = 8
"""Of a curve in a table; the plots show all."""


def training_table(results: Results) -> Table:
    """What each arm's runs took to their end, and to the highest of their last held-out losses."""
    curves = [row for row in results["training"] if row["metric"] == "val/loss" and "train_seconds" in row]
    goal = max((curve["value"][-1] for curve in curves), default=0.0)
    goals = [f"tokens to {goal:.3f}", f"minutes to {goal:.3f}"] * has_one_tokenizer(results)
    return Table(
        ["arm", "seeds", "hardware", "tokens", "minutes", "held-out loss", *goals],
        [
            [
                *(subject.shown, str(len(mine)), _hardware(mine), *_end_cells(mine)),
                *(_goal_cells(mine, goal) if goals else []),
            ]
            for subject in subjects_of(results)
            for mine in [_of(subject, curves)]
            if mine
        ],
    )


def emergence_table(results: Results, metric: str) -> Table:
    """A curve of every arm that has one, at some of the points that its runs share."""
    curves = [row for row in results["training"] if row["metric"] == metric]
    by_arm = [(subject, mine) for subject in subjects_of(results) if (mine := _of(subject, curves))]
    shared = set.intersection(*(set(row["tokens_seen"]) for row in curves)) if curves else set()
    shown = _thinned(sorted(shared - {0}))
    return Table(
        ["arm", *map(count_text, shown)],
        [
            [subject.shown, *(_value_cell(mine, tokens, metric) for tokens in shown)]
            for subject, mine in by_arm
            if shown
        ],
    )


def _hardware(curves: Sequence[Row]) -> str:
    """``NVIDIA H100 80GB HBM3``, ``2 x NVIDIA H200``; several, where runs differ."""
    told = [curve["hardware"] for curve in curves if curve.get("hardware")]
    names = (
        one["device"] if one["num_devices"] == 1 else f"{one['num_devices']} x {one['device']}"
        for one in told
    )
    return ", ".join(dict.fromkeys(map(printable, names)))


def _end_cells(curves: Sequence[Row]) -> list[str]:
    return [
        count_text(fmean(curve["tokens_seen"][-1] for curve in curves)),
        over_seeds_text([curve["train_seconds"][-1] / 60 for curve in curves], ".2f"),
        over_seeds_text([curve["value"][-1] for curve in curves], ".3f"),
    ]


def _goal_cells(curves: Sequence[Row], goal: float) -> list[str]:
    return [
        count_text(fmean(_when(curve, "tokens_seen", goal) for curve in curves)),
        over_seeds_text([_when(curve, "train_seconds", goal) / 60 for curve in curves], ".2f"),
    ]


def _when(curve: Row, key: str, goal: float) -> float:
    """Where a curve first reaches the goal, on a straight line between its points."""
    losses, at = curve["value"], curve[key]
    first = next(index for index, loss in enumerate(losses) if loss <= goal)
    if first == 0:
        return float(at[0])
    share = (losses[first - 1] - goal) / (losses[first - 1] - losses[first])
    return float(at[first - 1] + share * (at[first] - at[first - 1]))


def _thinned(points: Sequence[int]) -> list[int]:
    """At most ``SHOWN_POINTS``, by constant factors, the first and the last among them."""
    if len(points) <= SHOWN_POINTS:
        return list(points)
    factor = (points[-1] / points[0]) ** (1 / (SHOWN_POINTS - 1))
    wanted = (points[0] * factor**power for power in range(SHOWN_POINTS - 1))
    return sorted({points[bisect_left(points, want * 0.999)] for want in wanted} | {points[-1]})


def _value_cell(curves: Iterable[Row], tokens: int, metric: str) -> str:
    value = fmean(curve["value"][curve["tokens_seen"].index(tokens)] for curve in curves)
    if metric.startswith("sink/"):
        return share_text(value)
    return f"{value:.3f}" if metric == "val/loss" else f"{value:+z.3f}"


def _of(subject: Subject, curves: Iterable[Row]) -> list[Row]:
    return [curve for curve in curves if curve["model"] in subject.model_names]
