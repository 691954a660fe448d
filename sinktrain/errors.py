"""What a user did wrong, as exceptions: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable

CLOSE_ENOUGH = 0.6
"""``SequenceMatcher.ratio`` from which a word is taken for a slip of another."""


class SinktrainError(Exception):
    """A mistake that the user can mend. The message names what was typed and what would do."""


class ConfigError(SinktrainError):
    """A setting, config file or run folder that cannot be used as asked."""


class DataError(SinktrainError):
    """A text, tokenizer or shard that cannot be used as asked."""


class ModelError(SinktrainError):
    """A checkpoint or model folder that cannot be used as asked."""


class TrainingError(SinktrainError):
    """A run that had to stop: its losses went wrong, or its checkpoint could not be written."""


class StreamError(SinktrainError):
    """A stream that cannot be decoded as asked: layout, sink or tokens."""


class ExportError(SinktrainError):
    """An export that failed its own check, or a folder that it may not write to."""


class PublishError(SinktrainError):
    """A publication that the Hub does not take, or that would replace what is not ours."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean "…"?`` for the nearest known word, or nothing."""

    def likeness(other: str) -> tuple[float, int]:
        same_places = sum(map(operator.eq, word, other))  # 15m is as like 31m as 14m but for these
        return difflib.SequenceMatcher(None, other, word).ratio(), same_places

    nearest = max(known, key=likeness, default="")
    return f'; did you mean "{nearest}"?' if nearest and likeness(nearest)[0] >= CLOSE_ENOUGH else ""


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, short enough for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
