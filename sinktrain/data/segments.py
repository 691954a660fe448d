"""A text cut for tokenising: sizes planned once, documents to segments of one split, segments to tasks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sinktrain.data.sources import Source, documents, is_held_out, pieces, plain_bytes
from sinktrain.progress import progress_bar

PIECE_BYTES = 1 << 16
SMALLEST_PIECE_BYTES = 1 << 10
SMALL_TEXT_BYTES = 4_000_000  # a smaller text is cut finer, so that chance gives it both splits
SMALL_TEXT_PIECES = 64

VAL_BYTES = 2_000_000  # held-out text to aim at
VAL_FRACTIONS = (0.005, 0.1)
MEASURED_BYTES = int(VAL_BYTES / VAL_FRACTIONS[0])  # a longer text changes neither pieces nor fraction

TASK_BYTES = 1 << 20


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from the text, chosen once."""

    piece_bytes: int
    val_fraction: float
    text_bytes: int | None  # of all documents, where that is nearly known


def planned(source: Source, val_fraction: float | None) -> Plan:
    """Choose how to cut a text, by its size; only a given ``val_fraction`` is not chosen here.

    Raises:
        DataError: a text that cannot be used.
    """
    if not source.is_local:
        return Plan(PIECE_BYTES, val_fraction or VAL_FRACTIONS[0], None)
    measured = _measured(source)
    piece_bytes = PIECE_BYTES
    if measured < SMALL_TEXT_BYTES:
        piece_bytes = max(SMALLEST_PIECE_BYTES, measured // SMALL_TEXT_PIECES)
    smallest, largest = VAL_FRACTIONS
    val_fraction = val_fraction or min(max(VAL_BYTES / measured, smallest), largest)
    text_bytes = measured if measured < MEASURED_BYTES else plain_bytes(source)
    return Plan(piece_bytes, val_fraction, text_bytes)


def _measured(source: Source) -> int:
    """Return the UTF-8 bytes of the documents, counted up to ``MEASURED_BYTES``."""
    with progress_bar(desc="measuring the text", unit="B", unit_scale=True) as bar:
        size = 0
        for document in documents(source):
            num_bytes = len(document.encode())
            size += num_bytes
            bar.update(num_bytes)
            if size >= MEASURED_BYTES:
                break
    return size


@dataclass(frozen=True)
class Segment:
    """Consecutive pieces of one document and one split: what is tokenised in one go."""

    split: str
    text: str
    num_pieces: int
    document: int
    part: int  # number within the document
    is_first: bool  # of its split in its document
    ends_run: bool  # the next text is of another split or document


def training_pieces(source: Source, plan: Plan) -> Iterator[str]:
    """Yield the pieces that are not held out."""
    for document in documents(source):
        for piece in pieces(document, plan.piece_bytes):
            if not is_held_out(piece, plan.val_fraction):
                yield piece


def tasks(source: Source, plan: Plan, document: int, part: int) -> Iterator[list[Segment]]:
    """Yield the text from a part of a document on as work for a process.

    A task ends with the segment that brings it to ``TASK_BYTES`` characters.
    """
    task: list[Segment] = []
    size = 0
    for segment in _segments(source, plan, document, part):
        task.append(segment)
        size += len(segment.text)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _segments(source: Source, plan: Plan, document: int, part: int) -> Iterator[Segment]:
    for number, text in enumerate(documents(source, skip=document), start=document):
        done = part if number == document else 0
        yield from itertools.islice(_document_segments(number, text, plan), done, None)


def _document_segments(number: int, document: str, plan: Plan) -> Iterator[Segment]:
    """Yield the runs of a document, a long run in parts of at most ``TASK_BYTES``."""
    pieces_at_once = max(1, TASK_BYTES // plan.piece_bytes)
    part = 0
    seen: set[str] = set()
    cut = pieces(document, plan.piece_bytes)
    for held_out, group in itertools.groupby(cut, lambda piece: is_held_out(piece, plan.val_fraction)):
        split = "val" if held_out else "train"
        run = list(group)
        for begin in range(0, len(run), pieces_at_once):
            end = begin + pieces_at_once
            batch = run[begin:end]
            is_first = split not in seen
            yield Segment(split, "".join(batch), len(batch), number, part, is_first, ends_run=end >= len(run))
            seen.add(split)
            part += 1
