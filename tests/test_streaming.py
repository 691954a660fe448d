"""Blockwise streaming against the authors' algorithm, written naively; layouts."""

import functools

import pytest
import torch
from grids import thinned
from oracles import (
    dense_forward,
    gathered_stream,
    model_with_every_part,
    random_tokens,
    rotate_everything_stream,
    tiny_model,
)
from torch import Tensor
from torch.nn import functional as F

import sinktrain
from sinktrain.errors import StreamError
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.places import Places, null_slots
from sinktrain.model.rotary import apply_rotary, rotary_angles
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming.blockwise import MAX_LOGITS, stream_logits, stream_loss
from sinktrain.streaming.layout import Layout, default_layouts, parse_layouts

EXACT = {"rtol": 0, "atol": 1e-12}
GROWING = [
    kind for kind in sorted(KINDS) if (null := KINDS[kind](32, 2).null_slot()) and null.key is not None
]
"""Kinds whose null slot has a key, which its distance matters to."""


@functools.cache
def case(
    sinks: int, window: int, rotary_pct: float, sink_ids: tuple[int, ...] = (), kind: str | None = None
) -> tuple[GPTNeoX, Tensor, Tensor]:
    """A model, a stream of more than three wraps that starts with the model's sinks, and its logits."""
    num_layers = 2 if window < 32 else 1
    model = tiny_model(rotary_pct=rotary_pct, sinks=sink_ids, kind=kind, num_hidden_layers=num_layers)
    tokens = random_tokens(1, sinks + 4 * window + 3)
    tokens[0, : len(model.sink_ids)] = torch.tensor(model.sink_ids)
    return model, tokens, gathered_stream(model, tokens, sinks, window)


@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 6), (1, 3), (2, 1), (4, 9)])
def test_the_fast_oracle_equals_the_authors_algorithm_as_they_wrote_it(sinks, window, rotary_pct):
    model, tokens, fast = case(sinks, window, rotary_pct)
    expected = rotate_everything_stream(model, tokens, sinks, window)
    torch.testing.assert_close(fast, expected, **EXACT)
    model = tiny_model(rotary_pct=rotary_pct, num_hidden_layers=1, use_parallel_residual=False)
    some = gathered_stream(model, tokens, sinks, window, at=[0, sinks + window, tokens.shape[1] - 1])
    expected = rotate_everything_stream(model, tokens, sinks, window)
    torch.testing.assert_close(some, expected[:, [0, sinks + window, -1]], **EXACT)


@pytest.mark.parametrize(
    ("sinks", "rotary_pct", "window"), thinned([0, 1, 2, 4], [0.25, 0.0, 1.0], [1, 3, 32], times=2)
)
def test_blocks_of_any_size_equal_the_oracle_through_three_wraps(sinks, window, rotary_pct):
    model, tokens, expected = case(sinks, window, rotary_pct)
    for block_size in (1 if window < 32 else 5, 7, window, 2 * window + 3, None):
        blocks = list(stream_logits(model, tokens, sinks, window, block_size))
        logits = torch.cat(blocks, dim=1)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, expected, **EXACT)


def test_blocks_equal_the_oracle_at_a_window_of_1023_through_three_wraps():
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "max_position_embeddings": 1024}
    model, tokens = tiny_model(num_hidden_layers=1, **sizes), random_tokens(1, 1 + 4 * 1023 + 3)
    at = [0, 1, 1022, 1023, 1024, 1025, 2046, 2047, 3069, 3070, 4092, 4093, 4095]
    expected = gathered_stream(model, tokens, 1, 1023, at=at)
    for block_size in (100, 1023, 2 * 1023 + 3, None):
        logits = torch.cat(list(stream_logits(model, tokens, 1, 1023, block_size)), dim=1)
        torch.testing.assert_close(logits[:, at], expected, **EXACT)


@pytest.mark.parametrize("sizes", [{"use_parallel_residual": False}, {"hidden_size": 512}], ids=str)
def test_streams_of_serial_and_wide_headed_networks_equal_the_oracle(sizes):
    model, tokens = tiny_model(**sizes), random_tokens(2, 30)
    logits = torch.cat(list(stream_logits(model, tokens, 2, 5, block_size=4)), dim=1)
    torch.testing.assert_close(logits, gathered_stream(model, tokens, 2, 5), **EXACT)


@pytest.mark.parametrize("sink_ids", [(90,), (90, 91)])
@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_streams_of_sink_models_equal_the_oracle_under_every_layout(sinks, sink_ids):
    model, tokens, expected = case(sinks, 5, 0.25, sink_ids)
    logits = torch.cat(list(stream_logits(model, tokens, sinks, 5, block_size=4)), dim=1)
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize(
    ("kind", "sinks", "window", "rotary_pct"),
    thinned(sorted(KINDS), [(0, 1, 1.0), (4, 9, 0.25), (1, 3, 1.0), (0, 9, 0.25)], times=2),
)
def test_every_kind_streams_in_blocks_as_the_oracle_has_it(kind, sinks, window, rotary_pct):
    """Also folded, with windows of 9; and the oracle is the authors' algorithm as they wrote it."""
    model, tokens, expected = case(sinks, window, rotary_pct, kind=kind)
    begun = tokens[:, : sinks + 2 * window + 1]
    as_written = rotate_everything_stream(model, begun, sinks, window)
    torch.testing.assert_close(expected[:, : begun.shape[1]], as_written, **EXACT)
    for block_size in (1, 7, 16, None):
        logits = torch.cat(list(stream_logits(model, tokens, sinks, window, block_size)), dim=1)
        torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_kind_that_used_every_part_would_stream_as_the_oracle_has_it(sinks):
    model, tokens = model_with_every_part(), random_tokens(2, 43)
    expected = gathered_stream(model, tokens, sinks, 9)
    as_written = rotate_everything_stream(model, tokens[:1], sinks, 9)
    torch.testing.assert_close(expected[:1], as_written, **EXACT)
    for block_size in (7, 16, None):
        logits = torch.cat(list(stream_logits(model, tokens, sinks, 9, block_size)), dim=1)
        torch.testing.assert_close(logits, expected, **EXACT)


def test_rows_of_a_batch_equal_each_row_alone():
    model, tokens = tiny_model(), random_tokens(3, 40)
    together = torch.cat(list(stream_logits(model, tokens, 2, 6)), dim=1)
    for row in range(3):
        alone = torch.cat(list(stream_logits(model, tokens[row : row + 1], 2, 6)), dim=1)
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)


@pytest.mark.parametrize(("sinks", "window"), [(0, 12), (4, 8)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_stream_equals_dense_until_the_first_eviction_and_not_after(kind, sinks, window):
    model, tokens = tiny_model(kind=kind), random_tokens(1, 14)
    tokens[:, : len(model.sink_ids)] = torch.tensor(model.sink_ids)
    stream = torch.cat(list(stream_logits(model, tokens, sinks, window)), dim=1)
    dense = dense_forward(model, tokens)
    torch.testing.assert_close(stream[:, :12], dense[:, :12], **EXACT)
    torch.testing.assert_close(model(tokens), dense, **EXACT)
    assert (stream[:, 12] - dense[:, 12]).abs().max() > 1e-3


def test_a_position_bug_cannot_hide_at_this_tolerance():
    """The usual sink + sliding-window mask, whose sink distances keep growing, is another function."""
    model, tokens, expected = case(2, 5, 0.25)
    steps = model.rotary_steps
    positions = torch.arange(tokens.shape[1])
    cos, sin = rotary_angles(positions, steps, torch.float64)
    visible = (positions < 2) | (positions > positions[:, None] - 5)
    visible &= positions <= positions[:, None]

    def attend(layer, q, k, v, null=None):
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    other = model.logits(model.hidden(tokens, attend))
    torch.testing.assert_close(other[:, :7], expected[:, :7], **EXACT)
    assert (other[:, 12:] - expected[:, 12:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", GROWING)
def test_a_null_slot_whose_distance_kept_growing_would_show(kind):
    model, tokens, expected = case(0, 9, 0.25, kind=kind)
    cos, sin = rotary_angles(torch.arange(tokens.shape[1]), model.rotary_steps, torch.float64)
    apart = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
    mask = torch.zeros(apart.shape, dtype=torch.float64).masked_fill_((apart < 0) | (apart >= 9), -torch.inf)

    def attend(layer, q, k, v, null):
        key = null.in_front(model.rotary_steps).key[None, :, None]
        value = torch.zeros_like(key) if null.value is None else null.value[None, :, None]
        keys = torch.cat((key, apply_rotary(k, cos, sin)), dim=2)
        values = torch.cat((value, v), dim=2)
        query, seen = apply_rotary(q, cos, sin), F.pad(mask, (1, 0))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)

    other = model.logits(model.hidden(tokens, attend))
    torch.testing.assert_close(other[:, :9], expected[:, :9], **EXACT)
    assert (other[:, 12:] - expected[:, 12:]).abs().max() > 1e-2


def test_blocks_are_cut_where_the_scores_would_need_too_much_memory(monkeypatch):
    model, tokens, expected = case(1, 16, 0.25)
    monkeypatch.setattr("sinktrain.streaming.band.MAX_SCORES", 2 * (17 + 16) * 3)
    parts = list(stream_logits(model, tokens, 1, 16))
    assert {part.shape[1] for part in parts[:-1]} == {3}
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)


@pytest.mark.parametrize("sink_ids", [(), (90, 91)])
def test_stream_loss_is_the_cross_entropy_of_the_oracle_and_nan_at_sinks(sink_ids):
    model, tokens, expected = case(1, 16, 0.25, sink_ids)
    losses = stream_loss(model, tokens, 1, 16, block_size=6)
    assert losses.dtype == torch.float64
    assert losses.shape == (1, tokens.shape[1] - 1)
    scored = F.cross_entropy(expected[0, :-1], tokens[0, 1:], reduction="none")
    is_sink = torch.isin(tokens[0, 1:], torch.tensor(sink_ids, dtype=torch.int64))
    assert torch.equal(losses[0].isnan(), is_sink)
    torch.testing.assert_close(losses[0, ~is_sink], scored[~is_sink], **EXACT)


def test_stream_loss_is_the_same_when_its_logits_come_in_chunks(monkeypatch):
    model, tokens, _ = case(1, 16, 0.25)
    whole = stream_loss(model, tokens, 1, 16)
    assert tokens.shape[1] * 97 < MAX_LOGITS
    monkeypatch.setattr("sinktrain.streaming.blockwise.MAX_LOGITS", 97 * 5)
    torch.testing.assert_close(stream_loss(model, tokens, 1, 16), whole, **EXACT)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_stream_loss_has_one_entry_less_than_tokens(length):
    losses = stream_loss(tiny_model(), random_tokens(2, length), 1, 16)
    assert losses.shape == (2, length - 1)
    assert not losses.isnan().any()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_float32_streams_stay_near_float64(kind):
    _, tokens, expected = case(2, 16, 0.25, kind=kind)
    narrow = tiny_model(dtype=torch.float32, kind=kind)
    assert stream_loss(narrow, tokens, 2, 16).dtype == torch.float32
    logits = torch.cat(list(stream_logits(narrow, tokens, 2, 16)), dim=1)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1.2e-2), (torch.float16, 2e-4)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_half_precision_streams_say_nearly_what_float64_says(kind, dtype, most):
    """Over 10,000 tokens, beside the dense model: tests/test_decoder.py."""
    _, tokens, expected = case(2, 16, 0.25, kind=kind)
    model = tiny_model(dtype=dtype, kind=kind)
    assert stream_loss(model, tokens, 2, 16).dtype == torch.float32
    logits = torch.cat(list(stream_logits(model, tokens, 2, 16)), dim=1)
    assert logits.dtype == dtype
    ours, theirs = logits.double().log_softmax(-1), expected.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert divergence.max() < most
    assert (ours.argmax(-1) == theirs.argmax(-1)).double().mean() > 0.9


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-5), (torch.float16, 1e-6)])
def test_a_null_slots_score_is_not_rounded_to_half_precision_again(dtype, most):
    """Attention's scale, whose inverse is no power of two here, would round it by up to 4e-3 in bfloat16."""
    model = model_with_every_part(dtype=dtype, hidden_size=64)
    places, nothing = Places(model, 0), torch.zeros(1, 2, 1, 32, dtype=dtype)
    angles = rotary_angles(torch.zeros(1, dtype=torch.int64), model.rotary_steps, torch.float32)
    query = places.queries(nothing, angles, angles).double()
    for null in null_slots(model):
        score = (query @ places.null(null, like=nothing)[0].double().mT).flatten() / 32**0.5
        torch.testing.assert_close(score, null.score.double(), rtol=0, atol=most)


def test_gradients_are_not_kept():
    model = tiny_model().requires_grad_(True)
    assert not next(stream_logits(model, random_tokens(1, 9), 1, 4)).requires_grad
    assert not stream_loss(model, random_tokens(1, 9), 1, 4).requires_grad


def test_a_stream_without_its_sink_is_refused_unless_asked_for():
    model, tokens = tiny_model(sinks=(90,)), random_tokens(2, 9)
    message = (
        r"the stream does not start with the model's sink \[90\]; put model.sink_ids in front, "
        "or pass require_sink=False to see what happens without"
    )
    with pytest.raises(StreamError, match=message):
        stream_loss(model, tokens, 1, 4)
    with pytest.raises(StreamError, match=message):
        next(stream_logits(model, tokens, 1, 4))
    assert stream_loss(model, tokens, 1, 4, require_sink=False).shape == (2, 8)
    tokens[0, 0] = 90
    with pytest.raises(StreamError, match=message):
        stream_loss(model, tokens, 1, 4)


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (torch.zeros(5).long(), {}, "a stream takes tokens of shape [1 or more, 1 or more], not [5]"),
        (torch.zeros(2, 0).long(), {}, "a stream takes tokens of shape [1 or more, 1 or more], not [2, 0]"),
        (torch.zeros(1, 5).long(), {"block_size": 0}, "block_size is 0; use 1 or more, or None"),
        (
            torch.zeros(1, 5).long(),
            {"window": 0},
            "layout 1+0 is too small; use 0 sinks or more and a window of 1 or more",
        ),
    ],
)
def test_streams_that_cannot_be_get_one_clear_line(tokens, settings, message):
    for stream in (stream_loss, lambda *args, **kwargs: list(stream_logits(*args, **kwargs))):
        with pytest.raises(StreamError) as raised:
            stream(tiny_model(), tokens, **{"sinks": 1, "window": 4, **settings})
        assert str(raised.value) == message


def test_layouts_are_read_and_printed_alike():
    assert Layout.parse(" 1+1023 ") == Layout(1, 1023)
    assert str(Layout(4, 1020)) == "4+1020"
    assert Layout(4, 1020).num_slots == 1024


@pytest.mark.parametrize("text", ["1024", "1+", "+5", "-1+5", "1 + 5", "1+5+2", ""])
def test_a_layout_that_is_none_is_quoted(text):
    with pytest.raises(StreamError) as raised:
        Layout.parse(text)
    assert str(raised.value) == f'layout "{text}" is not sinks+window; write it like 1+1023'


@pytest.mark.parametrize(
    ("layout", "remedy"),
    [(Layout(1, 2048), "1+2047"), (Layout(0, 5000), "0+2048"), (Layout(3000, 1), "2047+1")],
)
def test_a_layout_too_long_names_one_that_fits(layout, remedy):
    with pytest.raises(StreamError) as raised:
        layout.check_fits(2048)
    assert str(raised.value) == (
        f"layout {layout} needs {layout.num_slots} positions but the model was trained on 2048; "
        f"use at most {remedy}"
    )
    Layout.parse(remedy).check_fits(2048)


def test_default_layouts_are_the_papers_row_at_half_the_trained_length():
    assert [str(layout) for layout in default_layouts(2048)] == ["0+1024", "1+1023", "2+1022", "4+1020"]
    assert [str(layout) for layout in default_layouts(4)] == ["0+5", "1+4", "2+3", "4+1"]


def test_a_bare_size_stands_for_the_papers_row_and_no_layout_comes_twice():
    assert parse_layouts("2048") == default_layouts(4096)
    layouts = parse_layouts("1+7, 8,16 ,1+7,0+16,3+5")
    expected = ["1+7", "0+8", "2+6", "4+4", "0+16", "1+15", "2+14", "4+12", "3+5"]
    assert [str(layout) for layout in layouts] == expected
    assert str(parse_layouts("6")[-1]) == "4+2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8,5", "a row of 5 slots is too small; use 6 or more"),
        ("0", "a row of 0 slots is too small; use 6 or more"),
        ("1+7,", 'layout "" is not sinks+window; write it like 1+1023'),
        ("8.5", 'layout "8.5" is not sinks+window; write it like 1+1023'),
        ("1+0", "layout 1+0 is too small; use 0 sinks or more and a window of 1 or more"),
    ],
)
def test_layouts_that_are_none_are_quoted(text, message):
    with pytest.raises(StreamError) as raised:
        parse_layouts(text)
    assert str(raised.value) == message


def test_public_names_are_these():
    assert sinktrain.stream_logits is stream_logits
    assert sinktrain.stream_loss is stream_loss
