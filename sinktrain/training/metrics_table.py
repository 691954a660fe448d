"""``metrics.csv`` of a run: appended to, and continued without losing its past.

Lightning 2.6.6's CSVLogger deletes an existing file when a run goes on in the same folder.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sinktrain.files import atomic_path

COLUMNS = (
    "step",
    "train/loss",
    "val/loss",
    "lr",
    "grad_norm",
    "tokens_seen",
    "tokens_per_s",
    "skipped_steps",
    "data_wait",
    "mfu",
    "mfu_causal",
    "memory_bytes",
    "eta_s",
)


class MetricsTable:
    """One row for each time that something was measured; a cell is empty where it was not.

    A name that has no column yet gets one, behind the others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = self._read()[0] or list(COLUMNS)

    def append(self, step: int, metrics: dict[str, float]) -> None:
        new = [name for name in metrics if name not in self._columns]
        if new or not self.path.exists():
            self._columns += new
            self._write(self.rows())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow({"step": step, **metrics})

    def rows(self) -> list[dict[str, str]]:
        """The whole rows; one that a killed process left half written does not count."""
        return self._read()[1]

    def forget_after(self, step: int) -> None:
        """Drop what was measured after the checkpoint that a run continues from."""
        if self.path.exists():
            self._write([row for row in self.rows() if int(row["step"]) <= step])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        return list(reader.fieldnames or ()), list(reader)

    def _write(self, rows: list[dict[str, str]]) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


CURVES = ("val/loss", "stream/gap", "sink/metric", "sink/metric_null")
"""What is told of a run's course: held-out loss and gap in nats, shares of heads."""


def train_seconds(rows: Sequence[Mapping[str, str]]) -> float:
    """Time that a run's steps took, over all its starts, from the speed that each row tells."""
    return _progress(rows)[-1].seconds


def curves(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What was measured in training: rows of ``metric``, and of each point the ``step``, ``tokens_seen``,
    ``train_seconds`` (the steps' time until then, first compilation included) and ``value``.
    """
    progress = _progress(rows)
    found = []
    for metric in CURVES:
        points = [(int(row["step"]), float(row[metric])) for row in rows if row.get(metric)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points and len(progress) > 1:
            reached = [_reached(progress, step) for step, _ in points]
            found.append(
                {
                    "metric": metric,
                    "step": [step for step, _ in points],
                    "tokens_seen": [round(one.tokens) for one in reached],
                    "train_seconds": [round(one.seconds, 3) for one in reached],
                    "value": [value for _, value in points],
                }
            )
    return found


class _Progress(NamedTuple):
    step: int
    tokens: float
    seconds: float


def _progress(rows: Sequence[Mapping[str, str]]) -> list[_Progress]:
    """Where a run was whenever it told its speed, from the beginning on."""
    found = [_Progress(0, 0.0, 0.0)]
    for row in rows:
        if row.get("tokens_per_s") and row.get("tokens_seen"):
            tokens = float(row["tokens_seen"])
            spent = (tokens - found[-1].tokens) / float(row["tokens_per_s"])
            found.append(_Progress(int(row["step"]), tokens, found[-1].seconds + spent))
    return found


def _reached(progress: Sequence[_Progress], step: int) -> _Progress:
    """Where a run was at a step: on the line between two that told, or on behind the last as before it."""
    after = next((index for index, one in enumerate(progress) if one.step >= step), len(progress) - 1)
    before, after_it = progress[max(0, after - 1)], progress[max(1, after)]
    share = (step - before.step) / max(1, after_it.step - before.step)
    tokens = before.tokens + share * (after_it.tokens - before.tokens)
    return _Progress(step, tokens, before.seconds + share * (after_it.seconds - before.seconds))
