"""Rows of the results that remember their numbers, so that whatever is drawn from them can be traced."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from sinktrain.report.wording import Results, Row


@dataclass(frozen=True)
class Source:
    """Some rows of one list of the results; ``numbers`` are their places in it."""

    list_name: str
    numbers: Sequence[int]
    rows: Sequence[Row]

    @classmethod
    def of(cls, results: Results, list_name: str) -> Source:
        rows = results[list_name]
        return cls(list_name, range(len(rows)), rows)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def where(self, is_wanted: Callable[[Row], bool]) -> Source:
        return self._picked([at for at, row in enumerate(self.rows) if is_wanted(row)])

    def ordered(self, key: Callable[[Row], Any]) -> Source:
        return self._picked(sorted(range(len(self.rows)), key=lambda at: key(self.rows[at])))

    def by(self, key: Callable[[Row], Hashable]) -> dict[Any, Source]:
        """The rows in groups of one key each, in the order in which the keys first come."""
        groups: dict[Hashable, list[int]] = {}
        for at, row in enumerate(self.rows):
            groups.setdefault(key(row), []).append(at)
        return {name: self._picked(places) for name, places in groups.items()}

    def values(self, field: str) -> list[Any]:
        """What the rows hold in a field, one after another; a row whose field is a list gives all of it."""
        found: list[Any] = []
        for row in self.rows:
            value = field_value(row, field)
            found.extend(value if isinstance(value, list) else [value])
        return found

    def _picked(self, places: Sequence[int]) -> Source:
        return Source(self.list_name, [self.numbers[at] for at in places], [self.rows[at] for at in places])


def field_value(row: Row, field: str) -> Any:
    """``loss_nats``; ``ci95.0`` is the first entry of a list; ``sinks+window`` the sum of two fields."""
    if "+" in field:
        return sum(field_value(row, part) for part in field.split("+"))
    name, _, entry = field.partition(".")
    return row[name][int(entry)] if entry else row[name]


def all_texts(results: Results) -> list[str]:
    """Every text that something was measured on, in the order of measurement."""
    lists = ("perplexity", "paired", "position_loss", "removal")
    return list(dict.fromkeys(row["text"] for name in lists for row in results[name]))


def drawn_models(results: Results) -> set[str]:
    """Models that get panels of their own: all, or the first seed of each arm where seeds are compared."""
    models = results["models"]
    if not any(pair["interval"] == "seeds" for pair in results["paired"]):
        return {model["name"] for model in models}
    first = {model["arm"] or model["name"]: model["name"] for model in reversed(models)}
    return set(first.values())
