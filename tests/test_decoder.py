"""The decoder against the authors' algorithm and against itself: every way of feeding is the same stream."""

import io
from collections.abc import Sequence

import pytest
import torch
from oracles import dense_forward, random_tokens, rotate_everything_stream, tiny_model
from torch import Tensor

import sinktrain
from sinktrain.errors import StreamError
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.decoder import StreamingDecoder

EXACT = {"rtol": 0, "atol": 1e-12}


def step_through(decoder: StreamingDecoder, tokens: Tensor) -> Tensor:
    """int64[batch, seq] -> float[batch, seq, vocab]."""
    return torch.stack([decoder.step(token) for token in tokens.unbind(1)], dim=1)


def prefill_through(decoder: StreamingDecoder, tokens: Tensor, chunks: Sequence[int]) -> Tensor:
    """The logits after each chunk: float[batch, chunks, vocab]."""
    return torch.stack([decoder.prefill(part) for part in tokens.split(list(chunks), dim=1)], dim=1)


def alone(model: GPTNeoX, tokens: Tensor, sinks: int = 1, window: int = 5) -> Tensor:
    """The last logits of one row by itself: int64[seq] -> float[vocab]."""
    return StreamingDecoder(model, sinks, window).prefill(tokens[None])[0]


@pytest.mark.parametrize("max_rewind", [0, 3])
@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (1, 1), (1, 5), (2, 16), (4, 5)])
def test_steps_and_uneven_chunks_equal_the_oracle_after_three_wraps(sinks, window, rotary_pct, max_rewind):
    model, tokens = tiny_model(rotary_pct=rotary_pct), random_tokens(2, sinks + 4 * window + 3)
    expected = rotate_everything_stream(model, tokens, sinks, window)
    decoder = StreamingDecoder(model, sinks, window, batch_size=2, max_rewind=max_rewind)
    stepped = step_through(decoder, tokens)
    assert stepped.dtype == torch.float64
    torch.testing.assert_close(stepped, expected, **EXACT)

    chunks = [1, 2, 2]
    chunks.append(tokens.shape[1] - sum(chunks))
    decoder = StreamingDecoder(model, sinks, window, batch_size=2, max_rewind=max_rewind)
    ends = torch.tensor(chunks).cumsum(0) - 1
    torch.testing.assert_close(prefill_through(decoder, tokens, chunks), expected[:, ends], **EXACT)
    assert decoder.stream_pos.tolist() == [tokens.shape[1]] * 2


def test_steps_and_chunks_mixed_equal_the_oracle():
    model, tokens = tiny_model(), random_tokens(1, 60)
    expected = rotate_everything_stream(model, tokens, 2, 7)
    decoder = StreamingDecoder(model, 2, 7, max_rewind=2)
    chunks = [3, 1, 1, 20, 1, 2, 3, 4, 1, 9, 8, 7]
    ends = torch.tensor(chunks).cumsum(0) - 1
    torch.testing.assert_close(prefill_through(decoder, tokens, chunks), expected[:, ends], **EXACT)


def test_stream_equals_dense_until_the_first_eviction():
    model, tokens = tiny_model(sinks=(90,)), random_tokens(1, 16)
    tokens[0, 0] = 90
    logits = step_through(StreamingDecoder(model, 1, 15), tokens)
    torch.testing.assert_close(logits, dense_forward(model, tokens), **EXACT)


@pytest.mark.parametrize("start_pos", [2**24 + 1, 2**40, 2**62])
def test_start_pos_changes_nothing(start_pos):
    model, tokens = tiny_model(), random_tokens(1, 40)
    expected = step_through(StreamingDecoder(model, 1, 5), tokens)
    decoder = StreamingDecoder(model, 1, 5, start_pos=start_pos)
    torch.testing.assert_close(step_through(decoder, tokens), expected, rtol=0, atol=1e-11)
    assert decoder.stream_pos.tolist() == [start_pos + 40]


def test_start_pos_changes_nothing_above_the_noise_of_float32():
    model, tokens = tiny_model(dtype=torch.float32), random_tokens(1, 40)
    expected = step_through(StreamingDecoder(model, 1, 5), tokens)
    shifted = step_through(StreamingDecoder(model, 1, 5, start_pos=2**40), tokens)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-4)


def test_rows_of_mixed_age_equal_each_alone():
    model, tokens = tiny_model(), random_tokens(3, 60)
    decoder = StreamingDecoder(model, 1, 5, batch_size=3)
    last = decoder.prefill(tokens[:1, :33], rows=[0])
    torch.testing.assert_close(last[0], alone(model, tokens[0, :33]), **EXACT)
    last = decoder.prefill(tokens[[2, 0], 33:40], rows=[2, 0])
    torch.testing.assert_close(last[0], alone(model, tokens[2, 33:40]), **EXACT)
    torch.testing.assert_close(last[1], alone(model, tokens[0, :40]), **EXACT)
    assert decoder.stream_pos.tolist() == [40, 0, 7]
    for more in range(1, 13):
        last = decoder.step(tokens[:, 39 + more])
    torch.testing.assert_close(last[0], alone(model, tokens[0, :52]), **EXACT)
    torch.testing.assert_close(last[1], alone(model, tokens[1, 40:52]), **EXACT)
    torch.testing.assert_close(last[2], alone(model, tokens[2, 33:52]), **EXACT)


def test_ragged_rows_equal_each_alone():
    model, tokens = tiny_model(), random_tokens(4, 30)
    decoder = StreamingDecoder(model, 2, 5, batch_size=4)
    last = decoder.prefill(tokens, lengths=torch.tensor([30, 1, 7, 20]))
    assert decoder.stream_pos.tolist() == [30, 1, 7, 20]
    again = decoder.prefill(tokens[:2], rows=[3, 1], lengths=torch.tensor([2, 9]))
    for row, length in enumerate([30, 1, 7, 20]):
        torch.testing.assert_close(last[row], alone(model, tokens[row, :length], 2), **EXACT)
    longer = torch.cat((tokens[3, :20], tokens[0, :2]))
    torch.testing.assert_close(again[0], alone(model, longer, 2), **EXACT)
    longer = torch.cat((tokens[1, :1], tokens[1, :9]))
    torch.testing.assert_close(again[1], alone(model, longer, 2), **EXACT)


@pytest.mark.parametrize("fed", [4, 6, 40])
@pytest.mark.parametrize("taken_back", [0, 1, 4])
def test_rewind_is_as_if_the_tokens_had_never_been_fed(taken_back, fed):
    """Also after wraps, and also into the sinks (4 fed of 2 sinks)."""
    model, tokens = tiny_model(), random_tokens(2, 80)
    decoder = StreamingDecoder(model, 2, 5, batch_size=2, max_rewind=4)
    decoder.prefill(tokens[:, :fed])
    decoder.rewind(taken_back)
    assert decoder.stream_pos.tolist() == [fed - taken_back] * 2
    kept, other = tokens[:, : fed - taken_back], tokens[:, 50:80]
    expected = rotate_everything_stream(model, torch.cat((kept, other), dim=1), 2, 5)[:, kept.shape[1] :]
    torch.testing.assert_close(step_through(decoder.fork(), other), expected, **EXACT)
    ends = torch.tensor([3, 11, 29])
    torch.testing.assert_close(prefill_through(decoder, other, [4, 8, 18]), expected[:, ends], **EXACT)


def test_rewinds_in_a_row_cannot_reach_what_was_overwritten():
    """Two rewinds of max_rewind each once went twice as far back as the ring remembers."""
    model, tokens = tiny_model(), random_tokens(1, 60)
    decoder = StreamingDecoder(model, 1, 5, max_rewind=4)
    decoder.prefill(tokens[:, :40])
    decoder.rewind(3)
    decoder.rewind(1)
    with pytest.raises(StreamError, match=r"cannot rewind 1 tokens; at most 0 here \(max_rewind=4\)"):
        decoder.rewind(1)
    decoder.prefill(tokens[:, 40:42])
    decoder.rewind(2)
    expected = rotate_everything_stream(model, torch.cat((tokens[:, :36], tokens[:, 50:]), dim=1), 1, 5)
    torch.testing.assert_close(step_through(decoder, tokens[:, 50:]), expected[:, 36:], **EXACT)


def test_rewind_is_refused_beyond_its_limit_and_after_rows_were_fed_apart():
    decoder = StreamingDecoder(tiny_model(), 1, 5, batch_size=2, max_rewind=4)
    decoder.prefill(random_tokens(2, 2))
    for num_tokens in (3, -1):
        with pytest.raises(StreamError) as raised:
            decoder.rewind(num_tokens)
        assert str(raised.value) == f"cannot rewind {num_tokens} tokens; at most 2 here (max_rewind=4)"
    decoder.prefill(random_tokens(1, 9), rows=[1])
    with pytest.raises(StreamError, match=r"cannot rewind 1 tokens; at most 0 here"):
        decoder.rewind(1)
    decoder.prefill(random_tokens(2, 9))
    decoder.rewind(4)
    decoder.reset()
    with pytest.raises(StreamError, match=r"cannot rewind 1 tokens; at most 0 here"):
        decoder.rewind(1)


def test_forks_go_their_own_ways():
    model, tokens = tiny_model(), random_tokens(1, 60)
    decoder = StreamingDecoder(model, 1, 5, max_rewind=2)
    decoder.prefill(tokens[:, :20])
    twin = decoder.fork()
    other = torch.cat((tokens[:, :20], tokens[:, 40:]), dim=1)
    expected = rotate_everything_stream(model, other, 1, 5)[:, 20:]
    torch.testing.assert_close(step_through(twin, tokens[:, 40:]), expected, **EXACT)
    expected = rotate_everything_stream(model, tokens[:, :40], 1, 5)[:, 20:]
    torch.testing.assert_close(step_through(decoder, tokens[:, 20:40]), expected, **EXACT)


def test_saved_state_continues_bit_for_bit_after_a_trip_through_a_file():
    model, tokens = tiny_model(sinks=(90,)), random_tokens(2, 60)
    tokens[:, 0] = 90
    decoder = StreamingDecoder(model, 1, 5, batch_size=2, start_pos=7, max_rewind=2)
    decoder.prefill(tokens[:, :20])
    file = io.BytesIO()
    torch.save(decoder.state_dict(), file)
    file.seek(0)
    other = StreamingDecoder(model, 1, 5, batch_size=2, max_rewind=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.stream_pos, decoder.stream_pos)
    other.rewind(2)
    decoder.rewind(2)
    assert torch.equal(step_through(other, tokens[:, 20:]), step_through(decoder, tokens[:, 20:]))


def test_state_is_a_copy():
    decoder = StreamingDecoder(tiny_model(), 1, 5)
    decoder.prefill(random_tokens(1, 9))
    state = decoder.state_dict()
    before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    decoder.prefill(random_tokens(1, 9))
    assert set(before) == {"age", "keys", "values"}
    for name, value in before.items():
        assert torch.equal(state[name], value), name


def test_foreign_states_are_refused_and_change_nothing():
    model = tiny_model()
    decoder = StreamingDecoder(model, 1, 5)
    decoder.prefill(random_tokens(1, 9))
    twin = decoder.fork()
    with pytest.raises(StreamError) as raised:
        decoder.load_state_dict(model.state_dict())
    assert str(raised.value) == (
        "this is not the state of a StreamingDecoder: it has no layout, start_pos, rewindable, min_age, "
        "max_age, age, keys, values"
    )
    with pytest.raises(StreamError) as raised:
        decoder.load_state_dict(StreamingDecoder(model, 2, 4).state_dict())
    assert str(raised.value) == (
        "the state is of layout 2+4 and shape [2, 1, 2, 6, 20], the decoder of 1+5 and [2, 1, 2, 6, 20]; "
        "make it with the same arguments"
    )
    with pytest.raises(StreamError, match=r"shape \[2, 3, 2, 6, 20\], the decoder of 1\+5"):
        decoder.load_state_dict(StreamingDecoder(model, 1, 5, batch_size=3).state_dict())
    tokens = random_tokens(1, 9, seed=1)
    assert torch.equal(decoder.prefill(tokens), twin.prefill(tokens))


def test_reset_begins_new_streams_in_the_rows_named():
    model, tokens = tiny_model(), random_tokens(3, 60)
    decoder = StreamingDecoder(model, 1, 5, batch_size=3, max_rewind=2)
    decoder.prefill(tokens[:, :20])
    decoder.reset(rows=[1])
    assert decoder.stream_pos.tolist() == [20, 0, 20]
    last = decoder.prefill(tokens[:, 20:27])
    torch.testing.assert_close(last[0], alone(model, tokens[0, :27]), **EXACT)
    torch.testing.assert_close(last[1], alone(model, tokens[1, 20:27]), **EXACT)
    decoder.reset()
    assert decoder.stream_pos.tolist() == [0, 0, 0]
    fresh = StreamingDecoder(model, 1, 5, batch_size=3, max_rewind=2)
    assert torch.equal(step_through(decoder, tokens), step_through(fresh, tokens))


def test_cache_stays_constant_for_a_thousand_steps():
    decoder = StreamingDecoder(tiny_model(num_hidden_layers=1), 1, 5)
    before = decoder.cache_bytes
    pointers = {decoder._cache.keys.data_ptr(), decoder._cache.values.data_ptr()}
    for token in random_tokens(1000, 1):
        decoder.step(token)
    assert decoder.cache_bytes == before
    assert pointers == {decoder._cache.keys.data_ptr(), decoder._cache.values.data_ptr()}
    # keys are rotary_pct wider than values: 6 slots x 2 heads x (20 + 16) numbers of 8 bytes
    assert before == 6 * 2 * (20 + 16) * 8


def test_float32_and_bfloat16_decoders_keep_their_dtype():
    tokens = random_tokens(1, 40)
    expected = rotate_everything_stream(tiny_model(), tokens, 1, 5)
    narrow = step_through(StreamingDecoder(tiny_model(dtype=torch.float32), 1, 5), tokens)
    assert narrow.dtype == torch.float32
    assert (narrow - expected).abs().max() < 1e-4
    half = step_through(StreamingDecoder(tiny_model(dtype=torch.bfloat16), 1, 5), tokens)
    assert half.dtype == torch.bfloat16
    assert (half.argmax(-1) == expected.argmax(-1)).double().mean() > 0.9


def test_a_stream_without_its_sink_is_refused_unless_asked_for():
    model = tiny_model(sinks=(90, 91))
    decoder = StreamingDecoder(model, 2, 5)
    decoder.step(torch.tensor([90]))
    message = (
        r"the stream does not start with the model's sink \[90, 91\]; put model.sink_ids in front, "
        "or pass require_sink=False to see what happens without"
    )
    with pytest.raises(StreamError, match=message):
        decoder.step(torch.tensor([5]))
    decoder.step(torch.tensor([91]))
    decoder.step(torch.tensor([5]))
    decoder.reset()
    with pytest.raises(StreamError, match=message):
        decoder.prefill(torch.tensor([[90, 5]]))
    StreamingDecoder(model, 2, 5, require_sink=False).prefill(torch.tensor([[90, 5]]))


def test_no_stream_has_moved_when_one_of_ragged_rows_lacks_its_sink():
    decoder = StreamingDecoder(tiny_model(sinks=(90,)), 1, 5, batch_size=2)
    with pytest.raises(StreamError, match="does not start with the model's sink"):
        decoder.prefill(torch.tensor([[90, 5, 6], [5, 6, 7]]), lengths=torch.tensor([2, 3]))
    assert decoder.stream_pos.tolist() == [0, 0]


def test_a_row_begun_again_must_start_with_its_sink_beside_running_rows():
    decoder = StreamingDecoder(tiny_model(sinks=(90,)), 1, 5, batch_size=2)
    decoder.prefill(torch.tensor([[90, 5], [90, 6]]))
    decoder.reset(rows=[0])
    with pytest.raises(StreamError, match="does not start with the model's sink"):
        decoder.step(torch.tensor([7, 7]))
    decoder.step(torch.tensor([90, 7]))


def test_generate_continues_the_stream_with_the_most_probable_tokens():
    model, prompt = tiny_model(), random_tokens(2, 9)
    tokens = torch.stack(list(StreamingDecoder(model, 1, 5, 2).generate(prompt, 20, temperature=0)), dim=1)
    decoder = StreamingDecoder(model, 1, 5, 2)
    logits, expected = decoder.prefill(prompt), []
    for _ in range(20):
        expected.append(logits.argmax(-1))
        logits = decoder.step(expected[-1])
    assert torch.equal(tokens, torch.stack(expected, dim=1))


def test_generate_starts_a_fresh_sink_stream_with_its_sink_once_and_never_emits_it():
    model = tiny_model(sinks=(90, 91))
    prompt = torch.tensor([[3, 4]])
    with_sinks = torch.tensor([[90, 91, 3, 4]])
    results = []
    for given in (prompt, with_sinks):
        decoder = StreamingDecoder(model, 2, 5)
        results.append([int(token) for token in decoder.generate(given, 50, temperature=5.0, seed=1)])
        assert decoder.stream_pos.tolist() == [4 + 49]
        assert list(decoder.generate(torch.tensor([[3]]), 1, seed=1))
        assert decoder.stream_pos.tolist() == [4 + 50]
    assert results[0] == results[1]
    assert not {90, 91} & set(results[0])
    assert len(list(StreamingDecoder(model, 2, 5).generate(max_tokens=3))) == 3


def test_generate_goes_on_without_end_and_never_emits_what_is_suppressed():
    decoder = StreamingDecoder(tiny_model(), 1, 5)
    stream = decoder.generate(random_tokens(1, 3), seed=0, suppress=range(10, 97))
    assert all(int(next(stream)) < 10 for _ in range(100))


def test_generate_repeats_with_a_seed():
    def text(seed: int | None) -> list[int]:
        decoder = StreamingDecoder(tiny_model(), 1, 5)
        stream = decoder.generate(random_tokens(1, 3), 30, top_k=20, top_p=0.9, seed=seed)
        return [int(token) for token in stream]

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


def test_generate_refuses_bad_settings_before_the_stream_moves():
    decoder = StreamingDecoder(tiny_model(), 1, 5)
    with pytest.raises(StreamError, match="top_p is 2; use a probability above 0, at most 1"):
        next(decoder.generate(random_tokens(1, 3), top_p=2))
    assert decoder.stream_pos.tolist() == [0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda d: d.prefill(torch.zeros(2).long()),
            "prefill takes tokens of shape [2, 1 or more], not [2]",
        ),
        (
            lambda d: d.prefill(torch.zeros(3, 4).long()),
            "prefill takes tokens of shape [2, 1 or more], not [3, 4]",
        ),
        (
            lambda d: d.prefill(torch.zeros(2, 0).long()),
            "prefill takes tokens of shape [2, 1 or more], not [2, 0]",
        ),
        (
            lambda d: d.prefill(torch.zeros(2, 4).long(), rows=[0]),
            "prefill takes tokens of shape [1, 1 or more], not [2, 4]",
        ),
        (
            lambda d: d.prefill(torch.zeros(2, 4).long(), rows=[0, 2]),
            "rows must be different numbers from 0 to 1, not [0, 2]",
        ),
        (
            lambda d: d.prefill(torch.zeros(2, 4).long(), rows=[1, 1]),
            "rows must be different numbers from 0 to 1, not [1, 1]",
        ),
        (lambda d: d.reset([-1]), "rows must be different numbers from 0 to 1, not [-1]"),
        (lambda d: d.reset([]), "rows must be different numbers from 0 to 1, not []"),
        (
            lambda d: d.prefill(torch.zeros(2, 4).long(), lengths=torch.tensor([0, 4])),
            "lengths must be 2 numbers from 1 to 4, not [0, 4]",
        ),
        (
            lambda d: d.prefill(torch.zeros(2, 4).long(), lengths=torch.tensor([5, 4])),
            "lengths must be 2 numbers from 1 to 4, not [5, 4]",
        ),
        (
            lambda d: d.prefill(torch.zeros(2, 4).long(), lengths=torch.tensor([4])),
            "lengths must be 2 numbers from 1 to 4, not [4]",
        ),
        (
            lambda d: d.step(torch.zeros(2, 1).long()),
            "step takes one token for each stream, int64[batch], not [2, 1]",
        ),
        (
            lambda d: next(d.generate(torch.zeros(3).long())),
            "generate takes a prompt of shape [2, seq], not [3]",
        ),
        (
            lambda d: next(d.generate()),
            "nothing to continue from; give generate a prompt of one token or more",
        ),
        (
            lambda d: StreamingDecoder(d.model, 1, 256),
            "layout 1+256 needs 257 positions but the model was trained on 256; use at most 1+255",
        ),
        (
            lambda d: StreamingDecoder(d.model, 4, 0),
            "layout 4+0 is too small; use 0 sinks or more and a window of 1 or more",
        ),
        (
            lambda d: StreamingDecoder(d.model, 1, 5, batch_size=0),
            "batch_size is 0 and max_rewind 0; use 1 or more, and 0 or more",
        ),
        (
            lambda d: StreamingDecoder(d.model, 1, 5, max_rewind=-1),
            "batch_size is 1 and max_rewind -1; use 1 or more, and 0 or more",
        ),
    ],
)
def test_what_cannot_be_decoded_gets_one_clear_line(ask, message):
    decoder = StreamingDecoder(tiny_model(), 1, 5, batch_size=2)
    with pytest.raises(StreamError) as raised:
        ask(decoder)
    assert str(raised.value) == message
    assert decoder.stream_pos.tolist() == [0, 0]


def test_public_name_is_this():
    assert sinktrain.StreamingDecoder is StreamingDecoder
