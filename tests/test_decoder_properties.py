"""Any sequence of calls leaves every stream of a decoder where the oracle has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracles import VOCAB, gathered_stream, random_tokens, tiny_model
from safetensors.torch import load, save
from torch import Tensor

from sinktrain.errors import StreamError
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming.decoder import StreamingDecoder

EXACT = {"rtol": 0, "atol": 1e-11}
BRIEF = settings(max_examples=2, stateful_step_count=20, deadline=None, derandomize=True)
LONG = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True)

lengths = st.sampled_from([1, 2, 3, 5, 8, 13])


@dataclass(frozen=True)
class Setting:
    sinks: int
    window: int
    batch_size: int = 1
    max_rewind: int = 0
    start_pos: int = 0
    rotary_pct: float = 0.25
    sink_ids: tuple[int, ...] = ()
    kind: str | None = None


SETTINGS = [
    Setting(1, 5, max_rewind=4),
    Setting(0, 3, batch_size=3, rotary_pct=1.0),
    Setting(2, 1, batch_size=2, max_rewind=3, rotary_pct=0.0, sink_ids=(90, 91)),
    Setting(4, 4, batch_size=2, max_rewind=7, start_pos=2**40, sink_ids=(90,)),
    Setting(1, 6, batch_size=3, max_rewind=2, sink_ids=(90, 91)),
]
OF_KINDS = [Setting(0, 4, batch_size=2, max_rewind=3, start_pos=2**40, kind=kind) for kind in sorted(KINDS)]


class AnyUse(RuleBasedStateMachine):
    """A decoder beside what each of its rows was fed, and how far it can be rewound.

    ``rewindable`` is what the decoder must take back; it may take back ``perhaps`` instead, where the
    docstrings leave it open whether rows of a ragged prefill were fed together.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.model = tiny_model(sinks=setting.sink_ids, rotary_pct=setting.rotary_pct, kind=setting.kind)
        self.fed: list[list[int]] = [[] for _ in range(setting.batch_size)]
        self.all_rows = list(range(setting.batch_size))
        self.rewindable = self.perhaps = self.num_calls = 0
        self.decoder = self.fresh()
        self.left: list[tuple[StreamingDecoder, dict[str, Tensor], list[list[int]], int, int]] = []

    # What the tests know

    def fresh(self) -> StreamingDecoder:
        of = self.setting
        return StreamingDecoder(self.model, of.sinks, of.window, of.batch_size, of.start_pos, of.max_rewind)

    def tokens(self, rows: list[int], length: int) -> Tensor:
        """Random ones, others at every call, but the sink where a stream begins."""
        self.num_calls += 1
        tokens = random_tokens(len(rows), length, seed=self.num_calls)
        for index, row in enumerate(rows):
            rest = self.model.sink_ids[len(self.fed[row]) :][:length]
            tokens[index, : len(rest)] = torch.tensor(rest, dtype=torch.int64)
        return tokens

    def check(self, logits: Tensor, rows: list[int]) -> None:
        """Logits for the next token of these rows, and where all rows stand."""
        longest = max(len(self.fed[row]) for row in rows)
        padded = torch.tensor([self.fed[row] + [0] * (longest - len(self.fed[row])) for row in rows])
        expected = gathered_stream(self.model, padded, self.setting.sinks, self.setting.window)
        last = torch.tensor([len(self.fed[row]) - 1 for row in rows])
        torch.testing.assert_close(logits, expected[torch.arange(len(rows)), last], **EXACT)
        assert self.decoder.stream_pos.tolist() == [self.setting.start_pos + len(fed) for fed in self.fed]

    def check_refused(self, ask: Callable[[], object]) -> None:
        before = self.decoder.state_dict()
        with pytest.raises(StreamError):
            ask()
        assert_same_state(self.decoder, before)

    # What users do

    @rule()
    def step(self) -> None:
        rows = self.all_rows
        tokens = self.tokens(rows, 1)
        logits = self.decoder.step(tokens[:, 0])
        self.note(rows, tokens.tolist())
        self.check(logits, rows)

    @rule(length=lengths)
    def prefill(self, length: int) -> None:
        rows = self.all_rows
        tokens = self.tokens(rows, length)
        logits = self.decoder.prefill(tokens)
        self.note(rows, tokens.tolist())
        self.check(logits, rows)

    @rule(data=st.data(), length=lengths)
    def prefill_some_rows(self, data: st.DataObject, length: int) -> None:
        rows = data.draw(self.some_rows())
        tokens = self.tokens(rows, length)
        logits = self.decoder.prefill(tokens, rows=rows)
        self.note(rows, tokens.tolist(), is_open=len(rows) == len(self.fed))
        self.check(logits, rows)

    @rule(data=st.data(), length=lengths)
    def prefill_ragged_rows(self, data: st.DataObject, length: int) -> None:
        rows = data.draw(self.some_rows())
        lengths = data.draw(st.lists(st.integers(1, length), min_size=len(rows), max_size=len(rows)))
        tokens = self.tokens(rows, length)
        logits = self.decoder.prefill(tokens, rows=rows, lengths=torch.tensor(lengths))
        fed = [row[:count] for row, count in zip(tokens.tolist(), lengths, strict=True)]
        self.note(rows, fed, is_open=len(rows) == len(self.fed))
        self.check(logits, rows)

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        rows = data.draw(st.none() | self.some_rows())
        self.decoder.reset(rows)
        for row in self.all_rows if rows is None else rows:
            self.fed[row] = []
        self.rewindable = self.perhaps = 0

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.perhaps))
        try:
            self.decoder.rewind(count)
        except StreamError:
            assert count > self.rewindable
            return
        self.fed = [fed[: len(fed) - count] for fed in self.fed]
        self.rewindable, self.perhaps = max(0, self.rewindable - count), self.perhaps - count

    @rule(length=lengths, short=st.integers(0, 2))
    def prefill_and_think_better_of_it(self, length: int, short: int) -> None:
        """Most or all of what can be taken back is; another token follows."""
        self.prefill(length)
        count = max(0, self.rewindable - short)
        self.decoder.rewind(count)
        self.fed = [fed[: len(fed) - count] for fed in self.fed]
        self.rewindable, self.perhaps = self.rewindable - count, self.perhaps - count
        self.step()

    @invariant()
    def it_cannot_be_rewound_too_far(self) -> None:
        self.check_refused(lambda: self.decoder.rewind(self.perhaps + 1))

    @rule()
    def fork(self) -> None:
        """Goes on with the twin."""
        before = self.decoder.state_dict()
        self.left.append((self.decoder, before, [*self.fed], self.rewindable, self.perhaps))
        self.decoder = self.decoder.fork()

    @precondition(lambda self: self.left)
    @rule()
    def return_to_the_original(self) -> None:
        self.decoder, before, self.fed, self.rewindable, self.perhaps = self.left.pop()
        assert_same_state(self.decoder, before)

    @rule(is_used=st.booleans())
    def save_and_restore(self, is_used: bool) -> None:
        """Goes on with another decoder, which may have streams of its own until then."""
        state = load(save(self.decoder.state_dict()))
        other = self.fresh()
        if is_used:
            tokens = random_tokens(len(self.fed), 9)
            tokens[:, : len(self.model.sink_ids)] = torch.tensor(self.model.sink_ids)
            other.prefill(tokens)
        other.load_state_dict(state)
        assert_same_state(other, state)
        self.decoder = other

    @rule(data=st.data(), length=lengths, bad=st.sampled_from([VOCAB, -1]))
    def feed_what_is_no_token(self, data: st.DataObject, length: int, bad: int) -> None:
        rows = data.draw(self.some_rows())
        tokens = self.tokens(rows, length)
        tokens[data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, length - 1))] = bad
        self.check_refused(lambda: self.decoder.prefill(tokens, rows=rows))

    @precondition(lambda self: any(len(fed) < len(self.model.sink_ids) for fed in self.fed))
    @rule(data=st.data(), length=lengths)
    def forget_the_sink(self, data: st.DataObject, length: int) -> None:
        rows = data.draw(self.some_rows())
        rows = [row for row in rows if len(self.fed[row]) >= len(self.model.sink_ids)]
        rows.append(min(range(len(self.fed)), key=lambda row: len(self.fed[row])))
        tokens = self.tokens(rows, length)
        tokens[-1, 0] = 5
        self.check_refused(lambda: self.decoder.prefill(tokens, rows=rows))

    def teardown(self) -> None:
        while self.left:
            self.return_to_the_original()
            self.step()

    def some_rows(self) -> st.SearchStrategy[list[int]]:
        return st.lists(st.sampled_from(self.all_rows), min_size=1, unique=True)

    def note(self, rows: list[int], tokens: list[list[int]], is_open: bool = False) -> None:
        """Rows were fed these tokens; ``is_open``: all of them, but perhaps not together."""
        for row, new in zip(rows, tokens, strict=True):
            self.fed[row] = self.fed[row] + new
        is_together = rows == self.all_rows and len({len(new) for new in tokens}) == 1
        fewest = min(len(new) for new in tokens)
        self.rewindable = self.rewindable + fewest if is_together and not is_open else 0
        self.perhaps = self.perhaps + fewest if is_together or is_open else 0
        self.rewindable = min(self.rewindable, self.setting.max_rewind)
        self.perhaps = min(self.perhaps, self.setting.max_rewind)


def assert_same_state(decoder: StreamingDecoder, before: dict[str, Tensor]) -> None:
    after = decoder.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_any_sequence_of_calls_leaves_every_stream_where_the_oracle_has_it(setting: Setting) -> None:
    run_state_machine_as_test(lambda: AnyUse(setting), settings=BRIEF)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [*SETTINGS, *OF_KINDS], ids=str)
def test_many_long_sequences_of_calls_leave_every_stream_where_the_oracle_has_it(setting: Setting) -> None:
    run_state_machine_as_test(lambda: AnyUse(setting), settings=LONG)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sinks=st.integers(0, 5),
    window=st.integers(1, 20),
    max_rewind=st.integers(0, 25),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
)
def test_a_stream_cut_anywhere_equals_the_oracle(
    sinks: int, window: int, max_rewind: int, sizes: list[int]
) -> None:
    model, tokens = tiny_model(), random_tokens(2, sum(sizes))
    decoder = StreamingDecoder(model, sinks, window, batch_size=2, max_rewind=max_rewind)
    logits = torch.stack([decoder.prefill(piece) for piece in tokens.split(sizes, dim=1)], dim=1)
    ends = torch.tensor(sizes).cumsum(0) - 1
    torch.testing.assert_close(logits, gathered_stream(model, tokens, sinks, window)[:, ends], **EXACT)
