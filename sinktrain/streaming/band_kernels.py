"""Triton kernels of exact evaluation: banded attention with sinks, and the loss without the logits.

Axes: batch x head, token (of the block), slot (of the ring), head_dim (d). Positions are those of the
stream, from 0 on, the same in every row. A ring key at position p lies in slot ``p % ring_size``; the ring is
long enough for a window and a whole block, so that a block is written before it attends.

Slow twin: ``sinktrain.streaming.band.PlainBand``; on the CPU, Triton's interpreter runs these.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rotated(
    x, angles, token, d, in_block, stride_t, HALF: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows of queries or keys, rotated: float32[token, d]. ``angles`` is float32[token, cos or sin, HALF].

    The other half of each rotated pair is loaded again, which is cheaper than to exchange registers.
    """
    at = x + token[:, None] * stride_t
    inside = in_block[:, None] & (d < HEAD_DIM)[None, :]
    own = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    turns = inside & (d < 2 * HALF)[None, :]
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    other = tl.load(at + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    pair = tl.where(d < HALF, d, d - HALF)
    angle = angles + token[:, None] * 2 * HALF + pair[None, :]
    cos = tl.load(angle, mask=turns, other=1.0)
    sin = tl.load(angle + HALF, mask=turns, other=0.0)
    return own * cos + tl.where(d < HALF, -other, other) * sin


SIZES = ["age", "num_tokens", "num_sinks", "window", "ring_size"]
"""What a kernel is not compiled anew for."""


@triton.jit(do_not_specialize=SIZES)
def keep_keys(
    k, v, angles, ring_keys, ring_values, sink_keys, sink_values, age, num_tokens,
    stride_b, stride_h, stride_t, num_heads, num_sinks, ring_size,
    SINK_SLOTS: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Rotate a block's keys and put them and its values into ring and sinks. Grid: (tokens, batch x head)."""
    stream = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    in_block = token < num_tokens
    start = (stream // num_heads) * stride_b + (stream % num_heads) * stride_h
    key = rotated(k + start, angles, token, d, in_block, stride_t, HALF, HEAD_DIM)
    inside = in_block[:, None] & (d < HEAD_DIM)[None, :]
    value = tl.load(v + start + token[:, None] * stride_t + d[None, :], mask=inside, other=0.0)

    position = age + token
    place = (stream * ring_size + position % ring_size)[:, None] * HEAD_DIM + d[None, :]
    tl.store(ring_keys + place, key.to(ring_keys.dtype.element_ty), mask=inside)
    tl.store(ring_values + place, value, mask=inside)
    is_sink = inside & (position < num_sinks)[:, None]
    place = (stream * SINK_SLOTS + position)[:, None] * HEAD_DIM + d[None, :]
    tl.store(sink_keys + place, key.to(sink_keys.dtype.element_ty), mask=is_sink)
    tl.store(sink_values + place, value, mask=is_sink)


@triton.jit
def joined(
    query, key, value, visible, top, total, mixed, scale,
    IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the running softmax: largest score, sum and mix of values so far."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if IS_MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    if IS_MASKED:  # a row that has seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        base = new_top
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(top - base)
    total = total * kept + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * kept[:, None], input_precision=PRECISION)
    return new_top, total, mixed


@triton.jit
def joined_tiles(
    query, ring_keys, ring_values, position, first, last, slots, d, top, total, mixed, scale,
    num_sinks, window, ring_size,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of the ring that hold positions from ``first`` to before ``last``, multiples of BLOCK_N."""
    in_head = (d < HEAD_DIM)[None, :]
    for start in range(first, last, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        place = (start % ring_size + slots)[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(ring_keys + place, mask=in_head, other=0.0)
        value = tl.load(ring_values + place, mask=in_head, other=0.0)
        at = (start + slots)[None, :]
        seen_from = position[:, None]
        visible = (at <= seen_from) & (at > seen_from - window) & (at >= num_sinks)
        top, total, mixed = joined(query, key, value, visible, top, total, mixed, scale, IS_MASKED, PRECISION)
    return top, total, mixed


@triton.jit(do_not_specialize=SIZES)
def band_attention(
    q, angles, sink_angles, ring_keys, ring_values, sink_keys, sink_values, null_key, null_score, null_value,
    out, age, num_tokens, scale,
    stride_b, stride_h, stride_t, num_heads, num_sinks, window, ring_size,
    HAS_SINKS: tl.constexpr, HAS_NULL: tl.constexpr, SINK_SLOTS: tl.constexpr, HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Mix the values of what each query sees. Grid: (tokens, batch x head); ``out`` is [batch, token, head, d].

    A null slot's key and value are float32[head, d], rotated, its score is float32[head]; each may be None.
    """
    stream = tl.program_id(1).to(tl.int64)
    first_token = tl.program_id(0) * BLOCK_M
    token = first_token + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    slots = tl.arange(0, BLOCK_N)
    in_block = token < num_tokens
    position = age + token
    start = (stream // num_heads) * stride_b + (stream % num_heads) * stride_h
    dtype = ring_keys.dtype.element_ty
    scale = scale * LOG2_E

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SINKS or null_key is not None:
        at_sinks = rotated(q + start, sink_angles, token, d, in_block, stride_t, HALF, HEAD_DIM)
    if HAS_NULL:  # the first that the softmax sees
        head = stream % num_heads
        top = tl.zeros([BLOCK_M], tl.float32)
        if null_score is not None:
            top += tl.load(null_score + head) * LOG2_E
        if null_key is not None:
            part = tl.load(null_key + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
            top += tl.sum(at_sinks * part[None, :], 1) * scale
        total += 1.0
        if null_value is not None:
            mixed += tl.load(null_value + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)[None, :]
    if HAS_SINKS:
        query = at_sinks.to(dtype)
        sink = tl.arange(0, SINK_SLOTS)
        place = (stream * SINK_SLOTS + sink)[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(sink_keys + place, mask=(d < HEAD_DIM)[None, :], other=0.0)
        value = tl.load(sink_values + place, mask=(d < HEAD_DIM)[None, :], other=0.0)
        visible = (sink < num_sinks)[None, :] & (sink[None, :] <= position[:, None])
        top, total, mixed = joined(query, key, value, visible, top, total, mixed, scale, True, PRECISION)

    query = rotated(q + start, angles, token, d, in_block, stride_t, HALF, HEAD_DIM).to(dtype)
    ring_keys += stream * ring_size * HEAD_DIM
    ring_values += stream * ring_size * HEAD_DIM
    oldest = age + first_token  # of the queries
    newest = oldest + BLOCK_M - 1
    first = tl.maximum(oldest - window + 1, num_sinks) // BLOCK_N * BLOCK_N
    # From here to there every query sees every key.
    whole_from = (tl.maximum(newest - window + 1, num_sinks) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_to = (oldest + 1) // BLOCK_N * BLOCK_N
    whole_to = tl.maximum(whole_to, whole_from)
    last = newest + 1
    whole_from = tl.minimum(whole_from, (last + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    top, total, mixed = joined_tiles(
        query, ring_keys, ring_values, position, first, whole_from, slots, d, top, total, mixed, scale,
        num_sinks, window, ring_size, HEAD_DIM, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    top, total, mixed = joined_tiles(
        query, ring_keys, ring_values, position, whole_from, whole_to, slots, d, top, total, mixed, scale,
        num_sinks, window, ring_size, HEAD_DIM, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    top, total, mixed = joined_tiles(
        query, ring_keys, ring_values, position, whole_to, last, slots, d, top, total, mixed, scale,
        num_sinks, window, ring_size, HEAD_DIM, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    row = (stream // num_heads) * num_tokens + token
    place = (row * num_heads + stream % num_heads)[:, None] * HEAD_DIM + d[None, :]
    mixed = mixed / total[:, None]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=in_block[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def linear_loss(
    hidden, weight, targets, losses, num_rows, vocab_size, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cross-entropy from hidden states, in nats: the logits stay in registers. Grid: (rows,)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < num_rows
    target = tl.load(targets + row, mask=in_rows, other=0)
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    chosen = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, vocab_size, BLOCK_N):
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        entry = start + n
        for first in range(0, WIDTH, BLOCK_K):
            in_k = first + k < WIDTH
            x = tl.load(hidden + row.to(tl.int64)[:, None] * WIDTH + (first + k)[None, :],
                        mask=in_rows[:, None] & in_k[None, :], other=0.0)  # fmt: skip
            w = tl.load(weight + entry[:, None].to(tl.int64) * WIDTH + (first + k)[None, :],
                        mask=(entry < vocab_size)[:, None] & in_k[None, :], other=0.0)  # fmt: skip
            logits = tl.dot(x, tl.trans(w), logits, input_precision=PRECISION)
        logits = tl.where((entry < vocab_size)[None, :], logits * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
        chosen += tl.sum(tl.where(entry[None, :] == target[:, None], logits, 0.0), 1)
    tl.store(losses + row, (top + tl.log2(total) - chosen) * LN_2, mask=in_rows)
