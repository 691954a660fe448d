"""Triton kernels of training: the rotation of queries and keys, and a softmax that becomes its gradient.

Axes: batch, seq, head, head_dim (d); a row is one token of a batch, an entry one of the vocabulary.

Slow twins: ``sinktrain.model.rotary.apply_rotary`` and ``sinktrain.model.loss.token_losses``; on the CPU,
Triton's interpreter runs these.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rotate_heads(
    x, cos, sin, out, stride_b, stride_s, stride_h, seq_len, num_heads, sign,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of one token by ``sign`` times its angles; ``out`` is [batch, seq, head, d], dense.

    ``cos`` and ``sin`` are float32[seq, 2 * HALF]. Grid: (batch x seq,).
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // seq_len, row % seq_len
    head = tl.arange(0, BLOCK_H)
    is_head = (head < num_heads)[:, None]
    source = x + batch * stride_b + token * stride_s + head[:, None] * stride_h
    target = out + (row * num_heads + head[:, None]) * HEAD_DIM

    pair = tl.arange(0, BLOCK_HALF)
    in_pair = is_head & (pair < HALF)[None, :]
    angle = token * 2 * HALF + pair
    c = tl.load(cos + angle, mask=pair < HALF, other=1.0)[None, :]
    s = tl.load(sin + angle, mask=pair < HALF, other=0.0)[None, :] * sign
    first = tl.load(source + pair[None, :], mask=in_pair, other=0.0).to(tl.float32)
    second = tl.load(source + (pair + HALF)[None, :], mask=in_pair, other=0.0).to(tl.float32)
    tl.store(target + pair[None, :], (first * c - second * s).to(out.dtype.element_ty), mask=in_pair)
    tl.store(target + (pair + HALF)[None, :], (second * c + first * s).to(out.dtype.element_ty), mask=in_pair)

    d = tl.arange(0, BLOCK_D)
    passes = is_head & ((d >= 2 * HALF) & (d < HEAD_DIM))[None, :]
    passed = tl.load(source + d[None, :], mask=passes, other=0.0)
    tl.store(target + d[None, :], passed, mask=passes)


@triton.jit
def softmax_gradient(
    logits, targets, losses, vocab_size, ignored, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cross-entropy of one row in nats, and its gradient in place of the logits. Grid: (rows,).

    A row whose target is ``ignored`` has loss and gradient 0.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    is_scored = target != ignored
    logits += row * vocab_size
    entry = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        inside = start + entry < vocab_size
        x = tl.load(logits + start + entry, mask=inside, other=float("-inf")).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top), 0)
        top = new_top
    chosen = tl.load(logits + tl.where(is_scored, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(is_scored, (top + tl.log2(total)) * LN_2 - chosen, 0.0))
    if WITH_GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        share = tl.where(is_scored, 1.0 / total, 0.0)
        for start in range(0, vocab_size, BLOCK):
            inside = start + entry < vocab_size
            x = tl.load(logits + start + entry, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp2(x * LOG2_E - top) * share - tl.where(start + entry == target, 1.0, 0.0)
            tl.store(logits + start + entry, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def rotate_in_place(
    qkv, cos, sin, seq_len, num_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate the queries and keys of one token where they are: [batch, seq, head, 3 * d]. Grid: (batch x seq,)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, 2 * BLOCK_H)  # each head's query, then its key
    pair = tl.arange(0, BLOCK_HALF)
    inside = (part < 2 * num_heads)[:, None] & (pair < HALF)[None, :]
    angle = row % seq_len * 2 * HALF + pair
    c = tl.load(cos + angle, mask=pair < HALF, other=1.0)[None, :]
    s = tl.load(sin + angle, mask=pair < HALF, other=0.0)[None, :]
    start = (row * num_heads + part // 2) * 3 * HEAD_DIM + part % 2 * HEAD_DIM
    place = qkv + start[:, None] + pair[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (first * c - second * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * c + first * s).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def take_null(
    qkv, mixed, lse, key, score, value, kept, num_rows, seq_len, num_heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Let a null slot join a finished softmax, in place: mixed = kept * mixed + (1 - kept) * value.

    ``qkv`` is [batch, seq, head, 3 * d], rotated; ``mixed`` [batch, seq, head, d]; ``lse`` float32[batch,
    head, seq]; ``kept`` float32[batch, seq, head] takes what is left to the tokens. ``key`` and ``value``
    are [head, d] and ``score`` is [head]; each may be None. Grid: (blocks of rows, head).
    """
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    in_rows, is_d = row < num_rows, d < HEAD_DIM
    inside = in_rows[:, None] & is_d[None, :]
    own = row * num_heads + head
    scores = tl.zeros([BLOCK_T], tl.float32)
    if score is not None:
        scores += tl.load(score + head).to(tl.float32)
    if key is not None:
        q = tl.load(qkv + (own * 3 * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        k = tl.load(key + head * HEAD_DIM + d, mask=is_d, other=0.0).to(tl.float32)
        scores += tl.sum(q * k[None, :], 1) * scale
    from_lse = lse + (row // seq_len * num_heads + head) * seq_len + row % seq_len
    share = tl.sigmoid(tl.load(from_lse, mask=in_rows, other=0.0) - scores)
    place = mixed + (own * HEAD_DIM)[:, None] + d[None, :]
    out = tl.load(place, mask=inside, other=0.0).to(tl.float32) * share[:, None]
    if value is not None:
        v = tl.load(value + head * HEAD_DIM + d, mask=is_d, other=0.0).to(tl.float32)
        out += (1 - share)[:, None] * v[None, :]
    tl.store(place, out.to(mixed.dtype.element_ty), mask=inside)
    tl.store(kept + own, share, mask=in_rows)


@triton.jit
def null_gradient(
    gradient, mixed, kept, qkv, value, to_tokens, to_scores, sums, num_rows, num_heads,
    HAS_KEY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``take_null``.

    ``to_tokens`` takes ``kept * gradient``: with it and the final ``mixed`` the backward pass of the tokens'
    attention is that of both. ``to_scores`` float32[batch, seq, head] takes the gradient to each query's
    score of the slot, ``sums`` float32[block, head, 3, BLOCK_D] the sums over a block of STEPS * BLOCK_T rows:
    of it, of it times the query, and of the value's gradient. Grid: (blocks of rows, head).
    """
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    is_d = d < HEAD_DIM
    v = tl.zeros([BLOCK_D], tl.float32)
    if value is not None:
        v += tl.load(value + head * HEAD_DIM + d, mask=is_d, other=0.0).to(tl.float32)
    score_sum = tl.zeros([BLOCK_T], tl.float32)
    key_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for step in range(STEPS):
        row = ((tl.program_id(0) * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_rows = row < num_rows
        inside = in_rows[:, None] & is_d[None, :]
        own = row * num_heads + head
        place = (own * HEAD_DIM)[:, None] + d[None, :]
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        out = tl.load(mixed + place, mask=inside, other=0.0).to(tl.float32)
        share = tl.load(kept + own, mask=in_rows, other=1.0)
        to_score = (1 - share) * tl.sum(upstream * (v[None, :] - out), 1)
        tl.store(to_tokens + place, (upstream * share[:, None]).to(to_tokens.dtype.element_ty), mask=inside)
        tl.store(to_scores + own, to_score, mask=in_rows)
        score_sum += to_score
        if HAS_KEY:
            q = tl.load(qkv + (own * 3 * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0)
            key_sum += to_score[:, None] * q.to(tl.float32)
        if value is not None:
            value_sum += (1 - share)[:, None] * upstream
    total = sums + (tl.program_id(0) * num_heads + head) * 3 * BLOCK_D + d
    tl.store(total, tl.where(d == 0, tl.sum(score_sum, 0), 0.0))
    tl.store(total + BLOCK_D, tl.sum(key_sum, 0))
    tl.store(total + 2 * BLOCK_D, tl.sum(value_sum, 0))


@triton.jit
def turned_back(
    x, cos, sin, token, row, d, inside, stride, HALF: tl.constexpr, more, of_more, HEAD_DIM: tl.constexpr
):
    """Gradients of rotated heads, rotated back: float32[row, d]; first ``more[row] * of_more[d]`` joins them."""
    at = x + row[:, None] * stride
    own = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    turns = inside & (d < 2 * HALF)[None, :]
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    other = tl.load(at + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    if more is not None:
        own += more[:, None] * tl.load(of_more + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
        other += (
            more[:, None] * tl.load(of_more + partner, mask=d < 2 * HALF, other=0.0).to(tl.float32)[None, :]
        )
    angle = token[:, None] * 2 * HALF + d[None, :]
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    return own * c + tl.where(d < HALF, other, -other) * s


@triton.jit
def join_gradients(
    dq, dk, dv, cos, sin, to_scores, null_key, out, sums, num_rows, seq_len, num_heads, scale,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of rotated queries and keys and of values, to that of [batch, seq, head, 3 * d].

    ``dq``, ``dk`` and ``dv`` are [batch, seq, head, d], dense. What a null slot's key, [head, d], adds to
    ``dq`` comes from ``to_scores`` of ``null_gradient``; both may be None. ``sums`` float32[block, head, 3 * d] takes
    their sums over a block of STEPS * BLOCK_T rows. Grid: (blocks of rows, head).
    """
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    stride = num_heads * HEAD_DIM
    q_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)  # over rows only at the end: that needs all warps
    k_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for step in range(STEPS):
        row = ((tl.program_id(0) * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
        token = row % seq_len
        more = None
        if null_key is not None:
            more = tl.load(to_scores + row * num_heads + head, mask=row < num_rows, other=0.0) * scale
        at, of_more = head * HEAD_DIM, null_key
        if null_key is not None:
            of_more = null_key + at
        q = turned_back(dq + at, cos, sin, token, row, d, inside, stride, HALF, more, of_more, HEAD_DIM)
        k = turned_back(dk + at, cos, sin, token, row, d, inside, stride, HALF, None, None, HEAD_DIM)
        v = tl.load(dv + (row * stride + head * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0)
        target = out + ((row * num_heads + head) * 3 * HEAD_DIM)[:, None] + d[None, :]
        tl.store(target, q.to(out.dtype.element_ty), mask=inside)
        tl.store(target + HEAD_DIM, k.to(out.dtype.element_ty), mask=inside)
        tl.store(target + 2 * HEAD_DIM, v, mask=inside)
        q_sum += q
        k_sum += k
        v_sum += v.to(tl.float32)
    total = sums + (tl.program_id(0) * num_heads + head) * 3 * HEAD_DIM + d
    tl.store(total, tl.sum(q_sum, 0), mask=d < HEAD_DIM)
    tl.store(total + HEAD_DIM, tl.sum(k_sum, 0), mask=d < HEAD_DIM)
    tl.store(total + 2 * HEAD_DIM, tl.sum(v_sum, 0), mask=d < HEAD_DIM)


@triton.jit
def gelu_gradient(
    pre, gradient, act, sums, num_rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """GELU again, into ``act``, and its gradient in place of that to its output; all [row, width].

    ``sums`` float32[block, width] takes the sums over a block of STEPS * BLOCK_M rows.
    Grid: (blocks of columns, blocks of rows).
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # over rows only at the end: that needs all warps
    for step in range(STEPS):
        row = ((block * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # share of a normal distribution below x
        density = 0.3989422804014327 * tl.exp2(x * x * (-0.5 * LOG2_E))
        downstream = upstream * (below + x * density)
        tl.store(act + place, (x * below).to(act.dtype.element_ty), mask=inside)
        tl.store(gradient + place, downstream.to(gradient.dtype.element_ty), mask=inside)
        total += downstream
    tl.store(sums + block * width + column, tl.sum(total, 0), mask=column < width)
