"""A table as plain text: what stands in it, not how it looks."""

from __future__ import annotations

from dataclasses import dataclass

COLUMN_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Header and cells, all as plain text; the first column names its row."""

    header: list[str]
    rows: list[list[str]]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand right-aligned."""
        return all(row[column][:1] in set("+-<0123456789") | {""} for row in self.rows)
