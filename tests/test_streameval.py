"""StreamEval's scores are those of real greedy decoding, and nothing beyond a stream's reach is answered."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from every_kind import every_kind
from oracles import tiny_model
from tokenizers import models

from sinktrain.data.registers import HEADER, RegisterStream, register_stream, training_documents
from sinktrain.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from sinktrain.errors import DataError
from sinktrain.evaluation import streameval as module
from sinktrain.evaluation.pieces import with_sinks
from sinktrain.evaluation.streameval import (
    Questions,
    answered,
    greedy,
    query_distances,
    streameval,
    tokenized,
)
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import stream_logits
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

LAYOUTS = [Layout(0, 24), Layout(1, 23), Layout(4, 20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A line is some 15 tokens, a content one to four."""
    return train_tokenizer(iter(training_documents(20_000, 0.5, (0,))), vocab_size=330)


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    """As many tokens a line, but every digit is one."""
    return train_tokenizer(iter([HEADER + "Query: The REGISTER_CONTENT in line is <"] * 9), vocab_size=330)


def model_of(tokenizer: Tokenizer, num_sinks: int = 0, seed: int = 0) -> GPTNeoX:
    return tiny_model(seed, tokenizer.sink_token_ids[:num_sinks], vocab_size=tokenizer.padded_vocab_size)


def streams_of(
    num_streams: int, distance: int = 2, num_lines: int = 10, digits: int = 4
) -> list[RegisterStream]:
    return [register_stream((number,), distance, num_lines, digits) for number in range(num_streams)]


def decoded_stream(
    model: GPTNeoX, layout: Layout, draw: np.random.Generator
) -> tuple[list[int], list[tuple[int, int]], list[bool]]:
    """A stream that asks for what greedy decoding, token by token, gives there, or for all of it but one.

    Returns:
        Its tokens without sinks, first place and length of each answer, and which are right.
    """
    decoder = StreamingDecoder(model, layout.sinks, layout.window)
    stream, fed = list(model.sink_ids), 0
    answers: list[tuple[int, int]] = []
    is_right: list[bool] = []
    for _ in range(6):
        stream += draw.integers(90, size=5).tolist()
        for token in stream[fed:-1]:
            decoder.step(torch.tensor([token]))
        fed = len(stream) - 1
        length = int(draw.integers(1, 4))
        drawn = decoder.fork().generate(torch.tensor([stream[-1:]]), max_tokens=length, temperature=0)
        answer = [int(token) for token in drawn]
        is_right.append(bool(draw.random() < 0.5))
        if not is_right[-1]:
            wrong = draw.integers(length)
            answer[wrong] = (answer[wrong] + 1) % 90
        answers.append((len(stream) - len(model.sink_ids), length))
        stream += answer
    return stream[len(model.sink_ids) :], answers, is_right


@every_kind
def test_answers_are_right_where_greedy_decoding_token_by_token_gives_them(which: dict[str, Any]) -> None:
    model = tiny_model(**which)
    model.embed_out.weight[90:92] *= 10  # a sink would often be the most probable token, were that allowed
    for layout in (Layout(0, 8), Layout(4, 4)):
        made = [decoded_stream(model, layout, np.random.default_rng((0, number))) for number in range(2)]
        expected = [right for _, _, is_right in made for right in is_right]
        spans = [(stream, *answer) for stream, (_, answers, _) in enumerate(made) for answer in answers]
        tokens = [
            (place + index, stream, query)
            for query, (stream, place, length) in enumerate(spans)
            for index in range(length)
        ]
        place, stream, query = np.array(sorted(tokens)).T
        length = max(len(text) for text, _, _ in made)
        questions = Questions(
            tokens=np.array([text + [0] * (length - len(text)) for text, _, _ in made]),
            stream=stream,
            place=place,
            query=query,
            is_deciding=np.zeros(len(place), dtype=bool),
            choices=np.zeros((len(spans), 4), dtype=np.int64),
            true_choice=np.zeros(len(spans), dtype=np.int64),
            distance=np.zeros(len(spans), dtype=np.int64),
        )
        assert answered(questions, *greedy(model, layout, questions))["streameval"].tolist() == expected
        assert 0 < sum(expected) < len(expected)


def test_choice_is_the_most_probable_of_the_four_at_the_token_that_tells_them_apart(
    tokenizer: Tokenizer,
) -> None:
    model, layout = model_of(tokenizer, num_sinks=1), LAYOUTS[1]
    streams = streams_of(12)
    questions = tokenized(streams, tokenizer, first_token=0)
    expected = []
    for stream in streams:
        (query,) = stream.queries
        prompt = [token for piece in stream.pieces[: query.piece] for token in tokenizer.encode(piece)]
        decoder = StreamingDecoder(model, layout.sinks, layout.window)
        logits = decoder.prefill(torch.tensor([[*model.sink_ids, *prompt]]))[0]
        first = [tokenizer.encode(choice)[0] for choice in query.choices]
        expected.append(int(logits[first].argmax()) == query.true_choice)
    assert answered(questions, *greedy(model, layout, questions))["access"].tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_right_is_every_token_of_the_answer(tokenizer: Tokenizer) -> None:
    questions = tokenized(streams_of(20), tokenizer, first_token=0)
    lengths = np.bincount(questions.query)
    assert 1 < lengths.min() < lengths.max()  # ragged
    true = questions.tokens[questions.stream, questions.place]
    chosen = questions.true_choice[questions.query]
    right = answered(questions, true, chosen)
    assert right["streameval"].all()
    assert right["access"].all()
    for wrong in range(len(true)):
        tokens, choices = true.copy(), chosen.copy()
        tokens[wrong], choices[wrong] = -1, (choices[wrong] + 1) % 4
        right = answered(questions, tokens, choices)
        assert np.flatnonzero(~right["streameval"]).tolist() == [questions.query[wrong]]
        decided = [questions.query[wrong]] if questions.is_deciding[wrong] else []
        assert np.flatnonzero(~right["access"]).tolist() == decided


def test_questions_know_the_places_of_their_answers(tokenizer: Tokenizer) -> None:
    streams = streams_of(5, distance=6, num_lines=40)
    questions = tokenized(streams, tokenizer, first_token=0)
    queries = [(number, query) for number, stream in enumerate(streams) for query in stream.queries]
    assert np.array_equal(questions.place, np.sort(questions.place))
    assert (questions.tokens == tokenizer.eos_token_id).any()  # streams differ in length
    for index, (number, query) in enumerate(queries):
        of_query = questions.query == index
        places = questions.place[of_query]
        answer = tokenizer.encode(streams[number].pieces[query.piece])
        assert (questions.stream[of_query] == number).all()
        assert np.array_equal(places, places[0] + np.arange(len(answer)))
        row, distance = questions.tokens[number], questions.distance[index]
        assert row[places].tolist() == row[places - distance].tolist() == answer
        before = tokenizer.decode(row[: places[0]].tolist())
        assert before == "".join(streams[number].pieces[: query.piece])
        assert questions.choices[index][query.true_choice] == answer[questions.is_deciding[of_query].argmax()]
    assert questions.is_deciding.sum() == len(queries)


def test_pieces_are_the_tokens_of_the_whole_text_for_a_byte_level_tokenizer(tokenizer: Tokenizer) -> None:
    """So a model that read such lines in training, tokenised as one, meets the same tokens here."""
    (stream,) = streams_of(1, num_lines=200)
    ids = tokenizer.encode("".join(stream.pieces))
    assert [token for piece in stream.pieces for token in tokenizer.encode(piece)] == ids
    contents = [piece for piece in stream.pieces if piece.isdigit()]
    assert {len(tokenizer.encode(content)) for content in contents} >= {2, 3, 4}  # merged in many ways


def test_logits_at_a_question_do_not_know_a_line_out_of_reach(plain_tokenizer: Tokenizer) -> None:
    """Two layers pass on what came less than two windows before: from there on a line leaves no trace."""
    model = model_of(plain_tokenizer, num_sinks=1)
    assert model.config.network.num_hidden_layers == 2
    layout = Layout(1, 40)
    for distance, is_in_reach in ((1, True), (2, True), (6, False), (9, False)):
        (stream,) = streams_of(1, distance, num_lines=20)
        query = stream.queries[-1]
        pieces = list(stream.pieces)
        pieces[query.stated] = "".join(str((int(digit) + 1) % 10) for digit in pieces[query.stated])
        changed = RegisterStream(tuple(pieces), stream.queries)
        logits = []
        for one in (stream, changed):
            questions = tokenized([one], plain_tokenizer, first_token=0)
            of_stream = stream_logits(model, with_sinks(model, questions.tokens), layout.sinks, layout.window)
            place = questions.place[questions.query == len(stream.queries) - 1][0]
            logits.append(torch.cat(list(of_stream), dim=1)[0, place])  # the sink moves all by one
        difference = float((logits[0] - logits[1]).abs().max())
        assert difference > 1e-6 if is_in_reach else difference < 1e-12, (distance, difference)


def rows_of(tokenizer: Tokenizer, model: GPTNeoX | None = None, **options: Any) -> list[dict[str, Any]]:
    options.setdefault("num_queries", 4)
    return streameval(model or model_of(tokenizer), tokenizer, LAYOUTS, queries_per_stream=2, **options)


def test_rows_say_what_was_asked(tokenizer: Tokenizer) -> None:
    rows = rows_of(tokenizer, distances=[1, 3])
    asked = [(row["task"], row["sinks"], row["window"], row["distance_lines"]) for row in rows]
    assert asked == [
        (task, layout.sinks, layout.window, distance)
        for distance in (1, 3)
        for layout in LAYOUTS
        for task in ("streameval", "access")
    ]
    for row in rows:
        assert set(row) == {
            *("task", "policy", "sinks", "window", "distance_lines", "distance_tokens"),
            *("num_queries", "accuracy", "ci95", "chance"),
        }
        assert row["policy"] == "streaming"
        assert row["num_queries"] == 4
        assert row["chance"] == {"streameval": 1e-3, "access": 0.25}[row["task"]]
        assert 12 * row["distance_lines"] < row["distance_tokens"] < 20 * row["distance_lines"] + 5
        assert 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1
        assert all(type(value) in (str, int, float, list) for value in row.values())
    assert {row["chance"] for row in rows_of(tokenizer, distances=[1], digits=2)} == {0.01, 0.25}


def test_rows_are_the_shares_of_right_answers(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    (row,) = streameval(
        model,
        tokenizer,
        [LAYOUTS[1]],
        ["access"],
        seed=3,
        num_queries=40,
        queries_per_stream=2,
        distances=[2],
    )
    streams = [register_stream((3, 2, number), 2, 20) for number in range(20)]
    questions = tokenized(streams, tokenizer, first_token=24)
    is_right = answered(questions, *greedy(model, LAYOUTS[1], questions))["access"]
    assert row["accuracy"] == is_right.mean()
    assert row["num_queries"] == len(is_right) == 40
    assert 0 < row["accuracy"] < 1


def test_interval_is_wilsons(tokenizer: Tokenizer) -> None:
    for row in rows_of(tokenizer, distances=[1], num_queries=20):
        n, p, z = row["num_queries"], row["accuracy"], 1.959963984540054
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        assert row["ci95"] == pytest.approx([centre - half, centre + half], abs=1e-12)


def test_model_without_a_preference_is_right_by_chance(tokenizer: Tokenizer) -> None:
    """Ties must not go to the true choice because it stands first."""
    model = model_of(tokenizer)
    with torch.no_grad():
        model.embed_out.weight.zero_()
    (row,) = streameval(model, tokenizer, LAYOUTS[:1], ["access"], num_queries=100, distances=[1])
    assert abs(row["accuracy"] - 0.25) < 0.13


def test_same_seed_asks_every_model_and_layout_the_same(tokenizer: Tokenizer) -> None:
    first, again = (rows_of(tokenizer, distances=[2, 4]) for _ in range(2))
    other_model = rows_of(tokenizer, model_of(tokenizer, num_sinks=1, seed=5), distances=[2, 4])
    other_seed = rows_of(tokenizer, distances=[2, 4], seed=1)
    assert first == again
    tokens, others, seeded = (
        {(row["distance_lines"], row["distance_tokens"]) for row in rows}
        for rows in (first, other_model, other_seed)
    )
    assert tokens == others != seeded
    assert len(tokens) == 2


def test_questions_come_after_as_many_tokens_as_the_longest_layout_has_slots(tokenizer: Tokenizer) -> None:
    streams = streams_of(3, distance=2, num_lines=60)
    every = tokenized(streams, tokenizer, first_token=0)
    late = tokenized(streams, tokenizer, first_token=300)
    assert every.place.min() < 300 <= late.place.min()
    assert set(late.place) == {place for place in every.place if place >= late.place.min()}


@pytest.mark.parametrize(
    ("num_slots", "line_tokens", "distances"),
    [
        (1024, 14.0, [18, 20, 37, 55, 73, 110, 146]),
        (256, 16.0, [4, 8, 12, 16, 20, 24, 32]),
        (32, 16.0, [1, 2, 3, 4]),  # the paper's 20 lines are ten times as long
        (8, 16.0, [1]),
        (8192, 14.0, [20, 146, 293, 439]),  # further ones would need more digits
    ],
)
def test_distances_go_from_inside_the_layout_to_twice_its_length(
    num_slots: int, line_tokens: float, distances: list[int]
) -> None:
    assert query_distances(num_slots, line_tokens, 496) == distances


def test_long_layouts_get_fewer_questions(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.NUM_QUERIES > module.FEWER_QUERIES
    for name, value in {"LONG_LAYOUT": 24, "NUM_QUERIES": 20, "FEWER_QUERIES": 10}.items():
        monkeypatch.setattr(module, name, value)
    for window, num_queries in ((24, 20), (25, 10)):
        rows = streameval(model_of(tokenizer), tokenizer, [Layout(0, window)], ["access"], distances=[1])
        assert [row["num_queries"] for row in rows] == [num_queries]


def test_streams_beyond_one_batch_are_asked_too(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = rows_of(tokenizer, num_queries=10, distances=[2])
    monkeypatch.setattr(module, "STREAMS_AT_ONCE", 2)
    assert rows_of(tokenizer, num_queries=10, distances=[2]) == together
    assert together[0]["num_queries"] == 10


def test_only_the_tasks_that_were_asked_for_are_measured(tokenizer: Tokenizer) -> None:
    rows = rows_of(tokenizer, tasks=["latency", "access"], distances=[1])
    assert {row["task"] for row in rows} == {"access"}
    assert rows_of(tokenizer, tasks=["latency"]) == []


def test_tokenizer_that_does_not_tell_digits_apart_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, END_OF_TEXT: 1}, unk_token="<unk>"))
    tokenizer = Tokenizer(json.loads(backend.to_str()))
    expected = re.escape(
        "no token of [[0], [0], [0], [0]] tells these numbers apart: StreamEval and the access "
    )
    with pytest.raises(
        DataError, match=f"^{expected}test need a tokenizer that keeps digits; leave them out of"
    ):
        tokenized(streams_of(1), tokenizer, first_token=0)
