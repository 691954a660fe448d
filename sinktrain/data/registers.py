"""Lines of registers to remember, with questions about earlier ones: StreamEval's text, made from a seed.

    Below is a record of lines I want you to remember.
    The REGISTER_CONTENT in line 0 is <8806>
    The REGISTER_CONTENT in line 1 is <9757>
    …
    Query: The REGISTER_CONTENT in line 0 is <8806>

The paper (StreamingLLM, arXiv 2309.17453, Figure 8) shows the format and never released the text. Here a
question is followed by its true answer, so that one text can be learnt from and asked of.

A *distance* counts lines: the line just before a question is 1 line back. Questions do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sinktrain.errors import DataError

HEADER = "Below is a record of lines I want you to remember.\n"
DIGITS = 3
"""Of a content; the paper's figure has 4. An answer is right only as a whole, so every digit is more to
learn: two layers of width 64, after 9M tokens of nothing but such lines, gave 29% of the answers from one
line back with 3 digits, 4% with 4. With 2 a content would come round again too soon."""
MOST_DIGITS = 9

LINES_PER_QUERY = 10
NUM_CHOICES = 4

DOCUMENT_BYTES = (1 << 10, 1 << 14)
"""Shortest and longest training document."""
LARGEST_FIRST_LINE = 1000
MOST_LINES_PER_QUERY = 10

_TRAINING, _EVALUATION = 1, 2  # no key gives both the same numbers


@dataclass(frozen=True)
class Query:
    """A question in a stream.

    Args:
        piece: index of the piece that answers it.
        stated: index of the same content in its own line.
        choices: contents to choose from, in random order: the true one, and those of the three lines
            before its own.
        true_choice: index of the true one.
    """

    piece: int
    stated: int
    choices: tuple[str, ...]
    true_choice: int


@dataclass(frozen=True)
class RegisterStream:
    """A text with questions.

    Args:
        pieces: their concatenation is the text. Every content, in a line as in an answer, is a piece of
            its own: tokenised piece by piece, it is the same tokens in both places, whatever the tokenizer.
        queries: in order of the text.
    """

    pieces: tuple[str, ...]
    queries: tuple[Query, ...]


def largest_distance(digits: int) -> int:
    """Lines that a question can go back at most; a content comes again only further away."""
    return int(10**digits) // 2 - NUM_CHOICES


def register_stream(
    key: tuple[int, ...], distance: int, num_lines: int, digits: int = DIGITS
) -> RegisterStream:
    """Make a text to evaluate on: after every ten lines a question about the line ``distance`` back.

    Within reach of a question no content comes twice but as an answer, and no line is asked twice. The
    four choices begin with different digits, and are drawn together, alike in all but the order of their
    lines: to a model that sees none of them any is as likely as another, and where the true one is out of
    sight the others, which are older, are so too. So chance is 1/4 exactly.

    Args:
        key: seeds the text.
        distance: in lines, 1 or more.
        num_lines: from line 0 on; questions about lines before line 3 are left out.
        digits: of a content.

    Raises:
        DataError: ``digits`` out of range, or too few for the distance.
    """
    if not 1 <= digits <= MOST_DIGITS:
        raise DataError(f"contents of {digits} digits; use 1 to {MOST_DIGITS}")
    if distance > largest_distance(digits):
        raise DataError(
            f"contents of {digits} digits come again within {distance} lines; use more digits, or a distance "
            f"of at most {largest_distance(digits)}"
        )
    generator = np.random.default_rng((_EVALUATION, *key))
    ends = range(LINES_PER_QUERY, num_lines + 1, LINES_PER_QUERY)  # lines before a question
    asked = {end: end - distance for end in ends if end - distance >= NUM_CHOICES - 1}
    contents = _contents(generator, num_lines, list(asked.values()), digits)
    pieces = [HEADER]
    stated: list[int] = []
    queries: list[Query] = []
    for line, content in enumerate(contents):
        stated.append(len(pieces) + 1)
        pieces += _pieces(line, content)
        if (true_line := asked.get(line + 1)) is not None:
            order = generator.permutation(NUM_CHOICES).tolist()
            choices = tuple(contents[true_line - back] for back in order)
            queries.append(Query(len(pieces) + 1, stated[true_line], choices, order.index(0)))
            pieces += _pieces(true_line, contents[true_line], "Query: ")
    return RegisterStream(tuple(pieces), tuple(queries))


def training_documents(num_bytes: int, share: float, key: tuple[int, ...], digits: int = DIGITS) -> list[str]:
    """Make documents that are a share of a text, to go with some bytes of other text.

    Lines and questions as in ``register_stream``, but the first line's number, the lines between
    questions and the distances vary, so that the form can be learnt and the numbers cannot. Distances
    are spread evenly over octaves: short windows and long ones find questions that they can answer.

    Args:
        num_bytes: of the other text.
        share: of both together, below 1.
        key: seeds the documents.

    Returns:
        Documents with the bytes of that share, to half a line. Less than the shortest document is one of
        these or none, by chance, so that many small texts get their share together.
    """
    generator = np.random.default_rng((_TRAINING, *key))
    wanted = num_bytes * share / (1 - share)
    shortest, longest = DOCUMENT_BYTES
    documents: list[str] = []
    while wanted >= shortest:
        size = min(wanted, shortest * (longest / shortest) ** generator.random())
        documents.append(_document(generator, size, digits))
        wanted -= len(documents[-1])
    if generator.random() < wanted / shortest:
        documents.append(_document(generator, shortest, digits))
    return documents


def _document(generator: np.random.Generator, num_bytes: float, digits: int) -> str:
    """Write lines until the next would take the text further from ``num_bytes`` than it is."""
    parts = [HEADER]
    size = len(HEADER)
    for part in _endless_lines(generator, digits):
        if size + len(part) / 2 > num_bytes:
            return "".join(parts)
        parts.append(part)
        size += len(part)
    raise AssertionError("the lines do not end")


def _endless_lines(generator: np.random.Generator, digits: int) -> Iterator[str]:
    first = int(generator.integers(LARGEST_FIRST_LINE)) if generator.random() < 0.5 else 0
    lines_per_query = int(generator.integers(1, MOST_LINES_PER_QUERY + 1))
    contents: list[str] = []
    while True:
        contents.append(f"{generator.integers(10**digits):0{digits}}")
        yield "".join(_pieces(first + len(contents) - 1, contents[-1]))
        if len(contents) % lines_per_query == 0:
            distance = min(len(contents), int((len(contents) + 1) ** generator.random()))
            yield "".join(_pieces(first + len(contents) - distance, contents[-distance], "Query: "))


def _contents(
    generator: np.random.Generator, num_lines: int, asked_lines: list[int], digits: int
) -> list[str]:
    """Draw the content of every line, none seen lately; those to choose between together."""
    contents: list[str] = []
    group_starts = {line + 1 - NUM_CHOICES for line in asked_lines}
    while len(contents) < num_lines:
        count = NUM_CHOICES if len(contents) in group_starts else 1
        recent = contents[-(10**digits // 2) :]
        while True:
            drawn = [f"{number:0{digits}}" for number in generator.integers(10**digits, size=count)]
            if len({content[0] for content in drawn}) == count and set(drawn).isdisjoint(recent):
                break
        contents += drawn
    return contents


def _pieces(line: int, content: str, before: str = "") -> tuple[str, str, str]:
    return f"{before}The REGISTER_CONTENT in line {line} is <", content, ">\n"
