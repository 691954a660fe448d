"""``metrics.csv`` of a run: appended to, and continued without losing its past.

Lightning 2.6.6's CSVLogger deletes an existing file when a run goes on in the same folder.
"""

from __future__ import annotations

import csv
from pathlib import Path

from sinktrain.files import atomic_path

COLUMNS = (
    "step",
    "train/loss",
    "val/loss",
    "lr",
    "grad_norm",
    "tokens_seen",
    "tokens_per_s",
    "data_wait",
    "mfu",
    "mfu_causal",
)


class MetricsTable:
    """One row for each time that something was measured; a cell is empty where it was not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: dict[str, float]) -> None:
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow({"step": step, **metrics})

    def rows(self) -> list[dict[str, str]]:
        """The whole rows; one that a killed process left half written does not count."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(whole.splitlines()))

    def forget_after(self, step: int) -> None:
        """Drop what was measured after the checkpoint that a run continues from."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        if self.path.exists():
            with (
                atomic_path(self.path) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)
