"""StreamEval's text: every answer stands where it says, nothing gives it away, and a share is that share."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinktrain.data.registers import (
    DOCUMENT_BYTES,
    HEADER,
    largest_distance,
    register_stream,
    training_documents,
)
from sinktrain.errors import DataError

LINE = re.compile(r"(Query: )?The REGISTER_CONTENT in line (\d+) is <(\d+)>\n")
HALF_A_LINE = 30  # bytes
STREAMS = st.tuples(st.integers(0, 99), st.integers(1, 40), st.integers(0, 80))


def lines_of(text: str) -> list[tuple[bool, int, str]]:
    """(is_question, line, content) of every line after the header; nothing else is in the text."""
    assert text.startswith(HEADER)
    body = text.removeprefix(HEADER)
    found = list(LINE.finditer(body))
    assert "".join(match[0] for match in found) == body
    return [(match[1] is not None, int(match[2]), match[3]) for match in found]


def test_stream_is_the_papers_text() -> None:
    text = "".join(register_stream((0,), distance=7, num_lines=20).pieces)
    assert text.startswith(
        "Below is a record of lines I want you to remember.\nThe REGISTER_CONTENT in line 0 is <"
    )
    order = [(is_question, line) for is_question, line, _ in lines_of(text)]
    told = [(False, line) for line in range(20)]
    assert order == [*told[:10], (True, 3), *told[10:], (True, 13)]
    assert all(re.fullmatch(r"\d{3}", content) for _, _, content in lines_of(text))


@settings(max_examples=25)
@given(STREAMS)
def test_every_answer_is_what_its_line_told_the_distance_before(stream: tuple[int, int, int]) -> None:
    seed, distance, num_lines = stream
    made = register_stream((seed,), distance, num_lines)
    asked = []
    for query in made.queries:
        text = "".join(made.pieces[: query.piece + 2])
        told = {line: content for is_question, line, content in lines_of(text) if not is_question}
        is_question, line, content = lines_of(text)[-1]
        assert is_question
        assert line == len(told) - distance
        assert made.pieces[query.piece] == made.pieces[query.stated] == told[line] == content
        assert made.pieces[query.stated - 1] == f"The REGISTER_CONTENT in line {line} is <"
        asked.append(len(told))
    assert asked == [end for end in range(10, num_lines + 1, 10) if end - distance >= 3]


@settings(max_examples=25)
@given(STREAMS)
def test_no_content_comes_twice_in_reach_but_in_the_answer_to_its_one_question(
    stream: tuple[int, int, int],
) -> None:
    seed, distance, num_lines = stream
    lines = lines_of("".join(register_stream((seed,), distance, 2 * num_lines, digits=2).pieces))
    told = [content for is_question, _, content in lines if not is_question]
    questions = [line for is_question, line, _ in lines if is_question]
    assert len(told) == 2 * num_lines
    for begin in range(len(told)):
        in_reach = told[begin : begin + largest_distance(2) + 4]
        assert len(set(in_reach)) == len(in_reach)
    assert len(set(questions)) == len(questions)


@settings(max_examples=25)
@given(STREAMS)
def test_choices_are_the_line_and_the_three_before_it_and_begin_differently(
    stream: tuple[int, int, int],
) -> None:
    seed, distance, num_lines = stream
    made = register_stream((seed,), distance, num_lines)
    told = [content for is_question, _, content in lines_of("".join(made.pieces)) if not is_question]
    for query in made.queries:
        line = told.index(made.pieces[query.piece])
        assert query.choices[query.true_choice] == told[line]
        assert sorted(query.choices) == sorted(told[line - 3 : line + 1])
        assert len({choice[0] for choice in query.choices}) == 4


def test_choosing_without_having_seen_the_lines_is_right_one_time_in_four() -> None:
    made = [register_stream((0, number), distance=5, num_lines=200) for number in range(30)]
    queries = [query for stream in made for query in stream.queries]
    blind = {
        "the first": lambda choices: 0,
        "the smallest": lambda choices: choices.index(min(choices)),
        "the largest": lambda choices: choices.index(max(choices)),
        "that with the largest last digit": lambda choices: max(range(4), key=lambda one: choices[one][-1]),
    }
    for name, choose in blind.items():
        share = np.mean([choose(query.choices) == query.true_choice for query in queries])
        assert abs(share - 0.25) < 3 * (0.25 * 0.75 / len(queries)) ** 0.5, f"{name}: {share}"


def test_streams_follow_from_their_key_alone() -> None:
    first, again, other = (register_stream(key, 5, 100) for key in ((1, 2), (1, 2), (1, 3)))
    assert first == again
    shared = set(first.pieces) & set(other.pieces)
    assert len([piece for piece in shared if piece.isdigit()]) < 10


@pytest.mark.parametrize("digits", [1, 2, 9])
def test_contents_have_the_digits_that_were_asked_for(digits: int) -> None:
    contents = [content for _, _, content in lines_of("".join(register_stream((0,), 1, 10, digits).pieces))]
    assert {len(content) for content in contents} == {digits}
    documents = training_documents(5000, 0.5, (0,), digits)
    assert {len(content) for text in documents for _, _, content in lines_of(text)} == {digits}


@pytest.mark.parametrize("digits", [0, 10])
def test_digits_that_cannot_be_are_refused(digits: int) -> None:
    with pytest.raises(DataError, match=f"^contents of {digits} digits; use 1 to 9$"):
        register_stream((0,), 5, 10, digits)


def test_distance_over_which_contents_come_again_is_refused() -> None:
    assert len(register_stream((0,), 46, 1000, digits=2).queries) == 96
    expected = "contents of 2 digits come again within 47 lines; use more digits, or a distance of at most 46"
    with pytest.raises(DataError, match=f"^{expected}$"):
        register_stream((0,), 47, 1000, digits=2)


def test_training_documents_ask_for_what_they_told() -> None:
    for text in training_documents(200_000, 0.3, (0,)):
        told: dict[int, str] = {}
        for is_question, line, content in lines_of(text):
            assert not is_question or told[line] == content
            told[line] = content
        assert list(told) == list(range(min(told), min(told) + len(told)))


def distances_of(text: str) -> list[tuple[int, int]]:
    """(distance, lines told before) of every question of a document."""
    found = []
    told: list[int] = []
    for is_question, line, _ in lines_of(text):
        if is_question:
            found.append((told[-1] + 1 - line, len(told)))
        else:
            told.append(line)
    return found


def test_training_documents_vary_in_all_but_their_form() -> None:
    documents = training_documents(2_000_000, 0.2, (0,))
    told = [[line for is_question, line, _ in lines_of(text) if not is_question] for text in documents]
    firsts, lengths = {lines[0] for lines in told}, {len(lines) for lines in told}
    assert {0} < firsts
    assert max(firsts) > 500
    assert min(lengths) < 30 < 250 < max(lengths)
    between = {distances_of(text)[0][1] for text in documents}
    assert between == set(range(1, 11))


def test_training_distances_are_spread_evenly_over_octaves() -> None:
    found = [found for text in training_documents(500_000, 0.4, (1,)) for found in distances_of(text)]
    distances = np.array([distance for distance, num_told in found if num_told >= 64])
    counts = np.histogram(distances, [1, 4, 16, 64])[0]
    assert counts.min() > 0.25 * len(distances), counts
    assert distances.max() > 100


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_documents_have_their_share_to_the_shortest_document(share: float) -> None:
    num_bytes = 400_000
    documents = training_documents(num_bytes, share, (3,))
    sizes = [len(text.encode()) for text in documents]
    wanted = num_bytes * share / (1 - share)
    rest = wanted - sum(sizes)  # less than the shortest document, which chance adds or leaves out
    assert abs(rest) < DOCUMENT_BYTES[0] + HALF_A_LINE
    assert min(sizes) > DOCUMENT_BYTES[0] - HALF_A_LINE
    assert max(sizes) < DOCUMENT_BYTES[1] + HALF_A_LINE


def test_many_small_texts_get_their_share_together() -> None:
    sizes = [sum(map(len, training_documents(2000, 0.1, (number, 0)))) for number in range(4000)]
    assert set(sizes) > {0}
    assert sum(sizes) / (sum(sizes) + 4000 * 2000) == pytest.approx(0.1, rel=0.05)


def test_training_documents_follow_from_their_key_alone() -> None:
    first, again, other = (training_documents(50_000, 0.2, key) for key in ((4, 0), (4, 0), (4, 1)))
    assert first == again != other
    assert training_documents(50_000, 0.0, (4, 0)) == []
