"""StreamEval: what a stream has told is asked for some lines later, inside the window and beyond it.

Two tasks share the questions of one text (``sinktrain.data.registers``):

- *streameval* (StreamingLLM, arXiv 2309.17453, section 4.5): the answer counts when greedy decoding gives
  all of its tokens. No decoding is needed: greedy decoding gives the true tokens if and only if each of
  them is the most probable after the true ones before it, and those stand in the text. So one blockwise
  pass scores every question, exactly.
- *access*: the true content is to be more probable than three older ones of the stream. The four begin
  with different digits, so the first token that tells them apart decides. Blind guessing gives 1/4.

A window is no memory, and here that shows: what a layout keeps can be found again; what is more than
``layers x window`` tokens back cannot have left a trace, so there *access* is 1/4, whatever the sink.

Axes: stream, token (of the text, sinks not counted), query, answer (each token of each answer), choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from sinktrain.data.registers import (
    DIGITS,
    LINES_PER_QUERY,
    NUM_CHOICES,
    Query,
    RegisterStream,
    largest_distance,
    register_stream,
)
from sinktrain.data.tokenizer import Tokenizer
from sinktrain.errors import DataError
from sinktrain.evaluation.pieces import with_sinks
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.blockwise import stream_logits
from sinktrain.streaming.layout import Layout

Row = dict[str, Any]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

Task = Literal["streameval", "access"]
TASKS: tuple[Task, ...] = ("streameval", "access")

REACHES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Distances to ask over, in lengths of the longest layout."""
PAPER_LINES = 20
"""The paper's distance, asked over too where it is at most ``FURTHEST`` lengths."""
FURTHEST = 4

QUERIES_PER_STREAM = 10
NUM_QUERIES, FEWER_QUERIES = 100, 40
LONG_LAYOUT = 256
"""Slots beyond which fewer questions are asked: each costs as many tokens, which come before the first."""
STREAMS_AT_ONCE = 16
SAMPLE_LINES = 100
"""Of a text, to see how many tokens a line has."""


@dataclass(frozen=True)
class Questions:
    """Streams as tokens, and the questions in them.

    Args:
        tokens: int64[stream, token]; short streams are filled up with end-of-text.
        stream: int64[answer].
        place: int64[answer], index of the answer's token in its stream; ascending.
        query: int64[answer], which question the token answers.
        is_deciding: bool[answer], whether it is the first token that tells the choices apart.
        choices: int64[query, choice], the choices' tokens there.
        true_choice: int64[query].
        distance: int64[query], tokens from a content to its repetition in the answer. A query sees the
            content if its window is at least that.
    """

    tokens: Ints
    stream: Ints
    place: Ints
    query: Ints
    is_deciding: Bools
    choices: Ints
    true_choice: Ints
    distance: Ints


def streameval(
    model: GPTNeoX,
    tokenizer: Tokenizer,
    layouts: Sequence[Layout],
    tasks: Iterable[str] = TASKS,
    seed: int = 0,
    num_queries: int | None = None,
    queries_per_stream: int = QUERIES_PER_STREAM,
    distances: Sequence[int] | None = None,
    digits: int = DIGITS,
) -> list[Row]:
    """Ask a model for what its streams have told, under every layout and over every distance.

    All layouts, and all models of one tokenizer, get the same questions, from text token N on, N the most
    slots of any layout: as in the perplexity table.

    Args:
        tasks: others than ``TASKS`` are left alone.
        seed: of the text.
        num_queries: for each distance, over all streams; chosen by the layouts when None.
        queries_per_stream: the paper's figures are of 100 streams of 100 questions.
        distances: in lines; chosen by the layouts when None.
        digits: of a content.

    Returns:
        Rows of ``streameval[]`` in ``results.json``, without the model.

    Raises:
        DataError: a tokenizer that does not tell digits apart, or too few digits for a given distance.
    """
    wanted = [task for task in TASKS if task in set(tasks)]
    if not wanted or not layouts:
        return []
    num_slots = max(layout.num_slots for layout in layouts)
    if num_queries is None:
        num_queries = NUM_QUERIES if num_slots <= LONG_LAYOUT else FEWER_QUERIES
    num_streams = -(-num_queries // queries_per_stream)
    line_tokens, shortest_line = _line_tokens(tokenizer, digits)
    asked_over = distances or query_distances(num_slots, line_tokens, largest_distance(digits))
    rows: list[Row] = []
    with progress_bar(total=len(asked_over) * len(layouts), desc="StreamEval", unit="row") as bar:
        for distance in asked_over:
            first_lines = max(distance + NUM_CHOICES - 1, math.ceil(num_slots / shortest_line))
            num_lines = LINES_PER_QUERY * (-(-first_lines // LINES_PER_QUERY) + queries_per_stream - 1)
            streams = [
                register_stream((seed, distance, number), distance, num_lines, digits)
                for number in range(num_streams)
            ]
            batches = [
                tokenized(streams[begin : begin + STREAMS_AT_ONCE], tokenizer, num_slots)
                for begin in range(0, num_streams, STREAMS_AT_ONCE)
            ]
            distance_tokens = float(np.concatenate([batch.distance for batch in batches]).mean())
            for layout in layouts:
                outcomes = [answered(batch, *greedy(model, layout, batch)) for batch in batches]
                for task in wanted:
                    is_right = np.concatenate([outcome[task] for outcome in outcomes])
                    chance = 1 / NUM_CHOICES if task == "access" else 10.0**-digits
                    rows.append(_row(task, layout, distance, distance_tokens, is_right, chance))
                bar.update()
    return rows


def query_distances(num_slots: int, line_tokens: float, largest: int) -> list[int]:
    """Distances in lines, from inside a layout of so many slots to twice its length, but no larger ones."""
    lines = {max(1, round(reach * num_slots / line_tokens)) for reach in REACHES}
    if PAPER_LINES * line_tokens <= FURTHEST * num_slots:
        lines.add(PAPER_LINES)
    return sorted(distance for distance in lines if distance <= largest)


def tokenized(streams: Sequence[RegisterStream], tokenizer: Tokenizer, first_token: int) -> Questions:
    """Tokenise streams piece by piece, and find the questions that are answered from a text token on.

    Raises:
        DataError: the tokenizer does not tell the choices apart.
    """
    words = sorted({piece for stream in streams for piece in stream.pieces})
    ids = dict(zip(words, tokenizer.encode_batch(words), strict=True))
    found: list[_Found] = []
    texts: list[list[int]] = []
    for number, stream in enumerate(streams):
        lengths = [len(ids[piece]) for piece in stream.pieces]
        starts = np.cumsum([0, *lengths]).tolist()
        texts.append([token for piece in stream.pieces for token in ids[piece]])
        found += [
            _Found(number, starts[query.piece], starts[query.stated], query, lengths[query.piece])
            for query in stream.queries
            if starts[query.piece] >= first_token
        ]
    longest = max(map(len, texts))
    tokens = np.full((len(texts), longest), tokenizer.eos_token_id, dtype=np.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    of_choices = [[ids[choice] for choice in one.query.choices] for one in found]
    deciding = [_deciding(choices) for choices in of_choices]
    answers = [
        (one.place + index, number, index) for number, one in enumerate(found) for index in range(one.length)
    ]
    place, query, index = np.array(sorted(answers), dtype=np.int64).reshape(-1, 3).T
    return Questions(
        tokens=tokens,
        stream=np.array([one.stream for one in found], dtype=np.int64)[query],
        place=place,
        query=query,
        is_deciding=index == np.array(deciding, dtype=np.int64)[query],
        choices=np.array(
            [[choice[at] for choice in choices] for choices, at in zip(of_choices, deciding, strict=True)]
        ),
        true_choice=np.array([one.query.true_choice for one in found]),
        distance=np.array([one.place - one.stated for one in found]),
    )


def greedy(model: GPTNeoX, layout: Layout, questions: Questions) -> tuple[Ints, Ints]:
    """What a model answers, each token after the true ones before it.

    Returns:
        ``(tokens, chosen)``: int64[answer], the most probable tokens, never sinks; and int64[answer], which
        of its question's choices has the most probable token there.
    """
    device = model.device
    stream, place, choices = (
        torch.from_numpy(values).to(device)
        for values in (questions.stream, questions.place, questions.choices[questions.query])
    )
    fed_last = questions.place + len(model.sink_ids) - 1  # whose logits answer
    tokens: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    fed = low = 0
    for logits in stream_logits(model, with_sinks(model, questions.tokens), layout.sinks, layout.window):
        high = int(np.searchsorted(fed_last, fed + logits.shape[1]))
        at = place[low:high] + len(model.sink_ids) - 1 - fed
        of_answers = logits[stream[low:high], at]  # [answer, vocab]
        of_answers[:, model.sink_ids] = -torch.inf
        tokens.append(of_answers.argmax(dim=1))
        chosen.append(of_answers.gather(1, choices[low:high]).argmax(dim=1))
        fed, low = fed + logits.shape[1], high
    return torch.cat(tokens).cpu().numpy(), torch.cat(chosen).cpu().numpy()


def answered(questions: Questions, tokens: Ints, chosen: Ints) -> dict[Task, Bools]:
    """Which questions are answered rightly, bool[query], under each task; arguments as ``greedy`` returns."""
    true = questions.tokens[questions.stream, questions.place]
    num_wrong = np.bincount(questions.query[tokens != true], minlength=len(questions.true_choice))
    picked = np.empty_like(questions.true_choice)
    picked[questions.query[questions.is_deciding]] = chosen[questions.is_deciding]
    return {"streameval": num_wrong == 0, "access": picked == questions.true_choice}


@dataclass(frozen=True)
class _Found:
    """A question of a stream: where its answer's tokens begin, where the content stood, how many they are."""

    stream: int
    place: int
    stated: int
    query: Query
    length: int


def _deciding(choices: list[list[int]]) -> int:
    """Return the index of the first token that tells the choices apart: all of them at once."""
    for index, column in enumerate(zip(*choices, strict=False)):
        if len(set(column)) == len(choices):
            return index
        if len(set(column)) > 1:
            break
    raise DataError(
        f"no token of {choices} tells these numbers apart: StreamEval and the access test need a tokenizer "
        "that keeps digits; leave them out of --tasks"
    )


def _line_tokens(tokenizer: Tokenizer, digits: int) -> tuple[float, int]:
    """Return the mean number of tokens of a line, with its share of questions, and that of the shortest."""
    stream = register_stream((0,), 1, SAMPLE_LINES, digits)
    lengths = [len(ids) for ids in tokenizer.encode_batch(list(stream.pieces[1:]))]
    of_lines = np.array(lengths).reshape(-1, 3).sum(axis=1)
    return of_lines.sum() / SAMPLE_LINES, int(of_lines.min())


def _row(
    task: Task, layout: Layout, distance: int, distance_tokens: float, is_right: Bools, chance: float
) -> Row:
    num_right, num_queries = int(is_right.sum()), len(is_right)
    interval = binomtest(num_right, num_queries).proportion_ci(0.95, method="wilson")
    return {
        "task": task,
        "policy": "streaming",
        "sinks": layout.sinks,
        "window": layout.window,
        "distance_lines": distance,
        "distance_tokens": distance_tokens,
        "num_queries": num_queries,
        "accuracy": num_right / num_queries,
        "ci95": [float(interval.low), float(interval.high)],
        "chance": chance,
    }
