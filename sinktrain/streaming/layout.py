"""Layouts: how many sink slots and how many recent tokens a stream keeps, printed ``1+1023``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinktrain.errors import StreamError

if TYPE_CHECKING:  # which needs torch, and a report does without
    from sinktrain.model.config import ModelConfig

SMALLEST_ROW = 6  # its 4+(N-4) keeps more than the current token
VANILLA_SINKS = 4
"""First tokens that a model without sinks of its own is streamed with: StreamingLLM's choice."""


@dataclass(frozen=True, order=True)
class Layout:
    """``sinks`` slots that are never reused, and the newest ``window`` other tokens, current one included."""

    sinks: int
    window: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise StreamError(f"layout {self} is too small; use 0 sinks or more and a window of 1 or more")

    def __str__(self) -> str:
        return f"{self.sinks}+{self.window}"

    @property
    def num_slots(self) -> int:
        return self.sinks + self.window

    @classmethod
    def parse(cls, text: str) -> Layout:
        match = re.fullmatch(r"\s*(\d+)\+(\d+)\s*", text)
        if not match:
            raise StreamError(f'layout "{text}" is not sinks+window; write it like 1+1023')
        return cls(int(match[1]), int(match[2]))

    def check_fits(self, trained_length: int) -> None:
        """Raise StreamError where the cache would use positions that the model has never seen."""
        if self.num_slots > trained_length:
            sinks = min(self.sinks, trained_length - 1)
            largest = Layout(sinks, trained_length - sinks)
            raise StreamError(
                f"layout {self} needs {self.num_slots} positions but the model was trained on "
                f"{trained_length}; use at most {largest}"
            )


def paper_row(num_slots: int) -> list[Layout]:
    """0+N, 1+(N-1), 2+(N-2), 4+(N-4): the columns of the paper's table for one cache size."""
    return [Layout(sinks, num_slots - sinks) for sinks in (0, 1, 2, 4)]


def default_layouts(trained_length: int) -> list[Layout]:
    """The paper's row with N half of the trained length."""
    return paper_row(max(5, trained_length // 2))


def parse_layouts(text: str) -> list[Layout]:
    """Layouts with commas between them; a bare N stands for the paper's row of N slots.

    Returns:
        Each layout once, as they were first named.
    """
    layouts: list[Layout] = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*\d+\s*", part):
            layouts.append(Layout.parse(part))
        elif int(part) < SMALLEST_ROW:
            raise StreamError(f"a row of {int(part)} slots is too small; use {SMALLEST_ROW} or more")
        else:
            layouts.extend(paper_row(int(part)))
    return list(dict.fromkeys(layouts))


def stream_layout(config: ModelConfig) -> Layout:
    """What a model streams with unless told otherwise: half the trained length, its own number of sinks
    for ``token`` models and the paper's four first tokens for others."""
    size = max(5, config.network.max_position_embeddings // 2)
    sinks = config.sink.count or VANILLA_SINKS
    return Layout(sinks, size - sinks)
