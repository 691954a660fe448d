"""Triton kernels of one decoding step: each reads its share of the weights or of the cache exactly once.

A step is a chain of small kernels, so what costs is not arithmetic but the gap between two of them,
in which the memory idles. Three things close it: a kernel does all that does not depend on its
predecessor first, which is to load its weights or its part of the cache into registers
(``PDL``: programmatic dependent launch, so that it runs while the predecessor still does); LayerNorm,
rotation, activation, bias and residual live inside the matrix products; and whichever program ends
last merges what the others left, so that no merging kernel is needed.

Activations between kernels, and the residual, are float32; weights and cache have the model's dtype.
Axes: row (stream), head, slot, head_dim (d), n and k (output and input of a matrix product).

Slow twin: the plain step of ``sinktrain.streaming.ring``; on the CPU, Triton's interpreter runs these.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)
RADIANS = tl.constexpr(6.283185307179586 / 2**64)  # in a 2^-64th of a turn


@triton.jit
def begin_step(
    tokens, ages, start_pos, embedding, rotary_steps, held_tokens, hidden, step_ages, angles, vocab_size,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    HIDDEN: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Embed each row's token, take its angles, and let the row age. Grid: (rows,).

    ``angles`` is float32[row, place, cos or sin, HALF]; places: ring, sinks.
    A token outside the vocabulary becomes NaN, which spoils its own row and nothing else.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    age = tl.load(ages + row)
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < vocab_size)

    i = tl.arange(0, BLOCK_R)
    step = tl.load(rotary_steps + i, mask=i < HALF, other=0)
    at_ring = (tl.load(start_pos) + age) * step
    at_sinks = tl.minimum(age, SINKS + WINDOW - 1) * step
    to = angles + row * 4 * HALF + i
    for place in tl.static_range(2):
        angle = (at_ring if place == 0 else at_sinks).to(tl.float64) * RADIANS
        tl.store(to + 2 * place * HALF, tl.cos(angle).to(tl.float32), mask=i < HALF)
        tl.store(to + (2 * place + 1) * HALF, tl.sin(angle).to(tl.float32), mask=i < HALF)

    d = tl.arange(0, BLOCK_H)
    x = tl.load(embedding + token * HIDDEN + d, mask=(d < HIDDEN) & known, other=float("nan"))
    tl.store(hidden + row * HIDDEN + d, x.to(tl.float32), mask=d < HIDDEN)
    slot = tl.where(age < SINKS, age, SINKS + (age - SINKS) % RING)
    tl.store(held_tokens + row * (SINKS + RING) + slot, token)
    tl.store(step_ages + row, age)
    tl.store(ages + row, age + 1)


@triton.jit
def norm_matvec(
    hidden,
    gain_a, shift_a, weight_a, bias_a, out_a, gain_b, shift_b, weight_b, bias_b, out_b,
    weight_gates, bias_gates, gates, eps,
    N_A: tl.constexpr, N_B: tl.constexpr, N_GATES: tl.constexpr, K: tl.constexpr,
    ACTIVATION_A: tl.constexpr, ACTIVATION_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: out = activation(linear(norm(hidden))), of a and b; gates = sigmoid(linear(norm_a(hidden))).

    Grid: (tiles of N_A, then of N_B, then of N_GATES,). A bias may be None, and so may all of b or of the gates
    where their N is 0.
    """
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    first_b = tl.cdiv(N_A, BLOCK_N)
    first_gates = first_b + tl.cdiv(N_B, BLOCK_N)
    if N_GATES > 0:  # asked first, which costs a quarter fewer registers than asked last
        if tile >= first_gates:
            _norm_matvec(hidden, gain_a, shift_a, weight_gates, bias_gates, gates, eps, tile - first_gates, N_GATES, K, "sigmoid", BLOCK_N, BLOCK_K, PDL)  # fmt: skip
    if tile < first_b:
        _norm_matvec(hidden, gain_a, shift_a, weight_a, bias_a, out_a, eps, tile, N_A, K, ACTIVATION_A, BLOCK_N, BLOCK_K, PDL)  # fmt: skip
    elif tile < first_gates:
        if N_B > 0:
            _norm_matvec(hidden, gain_b, shift_b, weight_b, bias_b, out_b, eps, tile - first_b, N_B, K, ACTIVATION_B, BLOCK_N, BLOCK_K, PDL)  # fmt: skip


@triton.jit
def _norm_matvec(
    hidden, gain, shift, weight, bias, out, eps, tile,
    N: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, k = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = _weight_rows(weight, n, k, N, K)
    g = tl.load(gain + k, mask=k < K, other=0).to(tl.float32)
    s = tl.load(shift + k, mask=k < K, other=0).to(tl.float32)
    bias_n = _bias(bias, n, N)
    if PDL:
        gdc_wait()
    x = tl.load(hidden + k, mask=k < K, other=0)
    mean = tl.sum(x) / K
    centred = tl.where(k < K, x - mean, 0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / K + eps) * g + s
    y = _product(w, normed) + bias_n
    tl.store(out + n, _activated(y, ACTIVATION).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def residual_matvec(
    hidden, x_a, weight_a, bias_a, x_b, weight_b, bias_b,
    N: tl.constexpr, K_A: tl.constexpr, K_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: hidden += linear_a(x_a) + linear_b(x_b). Grid: (tiles of N,); no b where K_B is 0."""
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_a = tl.arange(0, BLOCK_A)
    w_a = _weight_rows(weight_a, n, k_a, N, K_A)
    bias_n = _bias(bias_a, n, N)
    if K_B > 0:
        k_b = tl.arange(0, BLOCK_B)
        w_b = _weight_rows(weight_b, n, k_b, N, K_B)
        bias_n += _bias(bias_b, n, N)
    if PDL:
        gdc_wait()
    y = tl.load(hidden + n, mask=n < N, other=0) + bias_n
    part_a = tl.load(x_a + k_a, mask=k_a < K_A, other=0).to(tl.float32)
    if K_B > 0:
        part_b = tl.load(x_b + k_b, mask=k_b < K_B, other=0).to(tl.float32)
        y += _product(w_b, part_b)
    y += _product(w_a, part_a)
    tl.store(hidden + n, y, mask=n < N)


@triton.jit
def norm_rows(
    hidden, gain_a, shift_a, out_a, gain_b, shift_b, out_b, eps,
    K: tl.constexpr, HAS_B: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One or two LayerNorms of every row, in the model's dtype. Grid: (rows,)."""
    if PDL:
        gdc_launch_dependents()
    row, k = tl.program_id(0), tl.arange(0, BLOCK_K)
    g = tl.load(gain_a + k, mask=k < K, other=0).to(tl.float32)
    s = tl.load(shift_a + k, mask=k < K, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(hidden + row * K + k, mask=k < K, other=0)
    centred = tl.where(k < K, x - tl.sum(x) / K, 0)
    unit = centred * tl.rsqrt(tl.sum(centred * centred) / K + eps)
    tl.store(out_a + row * K + k, (unit * g + s).to(out_a.dtype.element_ty), mask=k < K)
    if HAS_B:
        g = tl.load(gain_b + k, mask=k < K, other=0).to(tl.float32)
        s = tl.load(shift_b + k, mask=k < K, other=0).to(tl.float32)
        tl.store(out_b + row * K + k, (unit * g + s).to(out_b.dtype.element_ty), mask=k < K)


@triton.jit
def matmul(
    rows, x_a, weight_a, bias_a, out_a, x_b, weight_b, bias_b, out_b, weight_gates, bias_gates, gates,
    N_A: tl.constexpr, N_B: tl.constexpr, N_GATES: tl.constexpr, K: tl.constexpr,
    ACTIVATION_A: tl.constexpr, ACTIVATION_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = activation(linear(x)), of a and b; gates = sigmoid(linear(x_a)).

    Grid: (tiles of N_A, then of N_B, then of N_GATES, tiles of rows).
    """
    tile = tl.program_id(0)
    first_b = tl.cdiv(N_A, BLOCK_N)
    first_gates = first_b + tl.cdiv(N_B, BLOCK_N)
    if N_GATES > 0:
        if tile >= first_gates:
            _matmul(
                rows, x_a, weight_gates, bias_gates, gates, tile - first_gates, N_GATES, K, "sigmoid",
                BLOCK_M, BLOCK_N, BLOCK_K, PDL,
            )  # fmt: skip
    if tile < first_b:
        _matmul(
            rows, x_a, weight_a, bias_a, out_a, tile, N_A, K, ACTIVATION_A, BLOCK_M, BLOCK_N, BLOCK_K, PDL
        )
    elif tile < first_gates:
        if N_B > 0:
            tile -= first_b
            _matmul(
                rows, x_b, weight_b, bias_b, out_b, tile, N_B, K, ACTIVATION_B, BLOCK_M, BLOCK_N, BLOCK_K, PDL
            )


@triton.jit
def _matmul(
    rows, x, weight, bias, out, tile,
    N: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bias_n = _bias(bias, n, N)
    if PDL:
        gdc_wait()
    y = _matmul_part(None, x, weight, m, n, rows, 0, K, N, K, BLOCK_M, BLOCK_N, BLOCK_K) + bias_n[None, :]
    if PDL:  # not before, because what comes next would take the place of tiles still to be computed
        gdc_launch_dependents()
    inside = (m < rows)[:, None] & (n < N)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :], _activated(y, ACTIVATION).to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def residual_matmul(
    hidden, rows, x_a, weight_a, bias_a, x_b, weight_b, bias_b, partials, arrivals,
    N: tl.constexpr, K_A: tl.constexpr, K_B: tl.constexpr, SPLITS_B: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``residual_matvec`` for many rows. Grid: (tiles of N, 1 + SPLITS_B, tiles of rows).

    Split 0 takes a, the others take SPLIT_K columns of b each; the program that ends last adds up
    in order, so that equal input gives equal bits.
    """
    if PDL:
        gdc_launch_dependents()
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPLITS_B == 0:
        w = _columns(weight_a, n, 0, K_A, N, K_A, BLOCK_K)
    elif split == 0:
        w = _columns(weight_a, n, 0, K_A, N, K_A, BLOCK_K)
    else:
        w = _columns(weight_b, n, (split - 1) * SPLIT_K, SPLIT_K, N, K_B, BLOCK_K)
    bias_n = tl.where(split == 0, _bias(bias_a, n, N) + _bias(bias_b, n, N), 0)
    if PDL:
        gdc_wait()
    if SPLITS_B == 0:
        y = _matmul_part(w, x_a, weight_a, m, n, rows, 0, K_A, N, K_A, BLOCK_M, BLOCK_N, BLOCK_K)
    elif split == 0:
        y = _matmul_part(w, x_a, weight_a, m, n, rows, 0, K_A, N, K_A, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        y = _matmul_part(
            w, x_b, weight_b, m, n, rows, (split - 1) * SPLIT_K, SPLIT_K, N, K_B, BLOCK_M, BLOCK_N, BLOCK_K
        )
    y += bias_n[None, :]

    inside = (m < rows)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if SPLITS_B == 0:
        tl.store(hidden + at, tl.load(hidden + at, mask=inside, other=0) + y, mask=inside)
    else:
        size = rows * N
        tl.store(partials + split * size + at, y, mask=inside)
        arrival = arrivals + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if _is_last(arrival, SPLITS_B + 1):
            total = tl.load(hidden + at, mask=inside, other=0)
            for i in tl.static_range(SPLITS_B + 1):
                total += tl.load(partials + i * size + at, mask=inside, other=0, cache_modifier=".cg")
            tl.store(hidden + at, total, mask=inside)


@triton.jit
def _matmul_part(
    w, x, weight, m, n, rows, first, LENGTH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight.T over LENGTH columns; ``w`` may hold the first BLOCK_K of them already."""
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if w is not None:
        part = _activations(x, m, rows, first, LENGTH, K, BLOCK_K)
        y = tl.dot(part.to(w.dtype), w, y, input_precision="ieee")
    for start in range(0 if w is None else BLOCK_K, LENGTH, BLOCK_K):
        w_next = _columns(weight, n, first + start, LENGTH - start, N, K, BLOCK_K)
        part = _activations(x, m, rows, first + start, LENGTH - start, K, BLOCK_K)
        y = tl.dot(part.to(w_next.dtype), w_next, y, input_precision="ieee")
    return y


@triton.jit
def _columns(weight, n, first, length, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    is_k = (first + k < K) & (k < length)
    at = n[None, :].to(tl.int64) * K + (first + k)[:, None]
    return tl.load(weight + at, mask=(n < N)[None, :] & is_k[:, None], other=0)


@triton.jit
def _activations(x, m, rows, first, length, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    is_k = (first + k < K) & (k < length)
    return tl.load(
        x + m[:, None] * K + (first + k)[None, :], mask=(m < rows)[:, None] & is_k[None, :], other=0
    )


@triton.jit
def ring_attend(
    qkv, angles, step_ages, keys, values, null_key, null_score, null_value, gates,
    partials, stats, arrivals, out, scale,
    HAS_NULL: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query a row against its ring, the new key and value written into it. Grid: (SPLITS, HEADS, rows).

    ``qkv`` is float32[row, HEADS, 3, HEAD_DIM], unrotated; ``keys`` and ``values`` are one layer's
    [row, HEADS, SINKS + RING, HEAD_DIM]; ``out`` is float32[row, HEADS, HEAD_DIM]. A null slot's key and value
    are float32[HEADS, HEAD_DIM], rotated, its score is float32[HEADS]; each may be None. So may ``gates``,
    float32[row, HEADS], which multiply the output.
    """
    if PDL and TILES == 1:
        gdc_launch_dependents()
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stream = row * HEADS + head
    d, slots = tl.arange(0, BLOCK_D), stream.to(tl.int64) * (SINKS + RING) * HEAD_DIM
    slot = split * TILES * BLOCK_S + tl.arange(0, BLOCK_S)
    k = _slot_rows(keys + slots, slot, d, SINKS + RING, HEAD_DIM)
    v = _slot_rows(values + slots, slot, d, SINKS + RING, HEAD_DIM)
    if HAS_NULL:
        k_null = _or_zero(null_key, head * HEAD_DIM + d, d < HEAD_DIM)
        v_null = _or_zero(null_value, head * HEAD_DIM + d, d < HEAD_DIM)
        score_null = _or_zero(null_score, head, head < HEADS) * LOG2_E
    if PDL:
        gdc_wait()

    age = tl.load(step_ages + row)
    if gates is not None:
        gate = tl.load(gates + stream)
    is_rotated = d < 2 * HALF
    frequency = tl.where(d < HALF, d, d - HALF)
    from_angles = angles + row * 4 * HALF + frequency
    cos_ring = tl.load(from_angles, mask=is_rotated, other=1)
    sin_ring = tl.load(from_angles + HALF, mask=is_rotated, other=0)
    cos_sink = tl.load(from_angles + 2 * HALF, mask=is_rotated, other=1)
    sin_sink = tl.load(from_angles + 3 * HALF, mask=is_rotated, other=0)
    sin_ring, sin_sink = tl.where(d < HALF, -sin_ring, sin_ring), tl.where(d < HALF, -sin_sink, sin_sink)
    partner = tl.where(is_rotated, tl.where(d < HALF, d + HALF, d - HALF), d)
    from_q, from_k, is_d = qkv + stream * 3 * HEAD_DIM, qkv + (stream * 3 + 1) * HEAD_DIM, d < HEAD_DIM
    q, q_partner = tl.load(from_q + d, mask=is_d, other=0), tl.load(from_q + partner, mask=is_d, other=0)
    own, own_partner = tl.load(from_k + d, mask=is_d, other=0), tl.load(from_k + partner, mask=is_d, other=0)
    q_ring = (q * cos_ring + q_partner * sin_ring) * (scale * LOG2_E)
    q_sink = (q * cos_sink + q_partner * sin_sink) * (scale * LOG2_E)
    is_sink = age < SINKS
    k_own = own * tl.where(is_sink, cos_sink, cos_ring) + own_partner * tl.where(is_sink, sin_sink, sin_ring)
    k_own = k_own.to(keys.dtype.element_ty)
    v_own = tl.load(from_k + HEAD_DIM + d, mask=is_d, other=0).to(values.dtype.element_ty)

    ring_age = age - SINKS
    ring_slot = (tl.maximum(ring_age, 0) % RING).to(tl.int32)
    own_slot = tl.where(is_sink, age.to(tl.int32), SINKS + ring_slot)
    if split == 0:
        tl.store(keys + slots + own_slot * HEAD_DIM + d, k_own, mask=is_d)
        tl.store(values + slots + own_slot * HEAD_DIM + d, v_own, mask=is_d)

    # Split 0 begins with the token itself, so that no tile has to be mended with it, and with a null slot.
    is_first = split == 0
    own_score = tl.sum(k_own.to(tl.float32) * tl.where(is_sink, q_sink, q_ring), axis=0)
    first_top, first_mass, first_mixed = own_score, 1.0, v_own.to(tl.float32)
    if HAS_NULL:
        if null_key is not None:
            score_null += tl.sum(k_null * q_sink, axis=0)
        first_top = tl.maximum(own_score, score_null)
        p_own, p_null = tl.exp2(own_score - first_top), tl.exp2(score_null - first_top)
        first_mass, first_mixed = p_own + p_null, p_own * first_mixed + p_null * v_null
    top = tl.where(is_first, first_top, -1e30)
    mass = tl.where(is_first, first_mass, 0.0)
    mixed = tl.where(is_first, first_mixed, 0)
    end = tl.minimum((split + 1) * TILES * BLOCK_S, SINKS + RING)
    for _ in tl.range(TILES, num_stages=1):
        if TILES > 1:  # loaded while this tile is computed
            k_next = _slot_rows(keys + slots, slot + BLOCK_S, d, end, HEAD_DIM)
            v_next = _slot_rows(values + slots, slot + BLOCK_S, d, end, HEAD_DIM)
        top, mass, mixed = _fold_tile(
            top, mass, mixed, k, v, slot, q_ring, q_sink, age, ring_slot, own_slot, end, SINKS, WINDOW, RING
        )
        if TILES > 1:
            k, v, slot = k_next, v_next, slot + BLOCK_S

    if PDL and TILES > 1:
        gdc_launch_dependents()
    if SPLITS == 1:
        total = mixed / mass
        if gates is not None:
            total *= gate
        tl.store(out + stream * HEAD_DIM + d, total, mask=is_d)
    else:
        part = stream * SPLITS + split
        tl.store(partials + part * HEAD_DIM + d, mixed, mask=is_d)
        tl.store(stats + 2 * part, top)
        tl.store(stats + 2 * part + 1, mass)
        if _is_last(arrivals + stream, SPLITS):
            i = tl.arange(0, BLOCK_SPLITS)
            parts, is_part = stream * SPLITS + i, i < SPLITS
            tops = tl.load(stats + 2 * parts, mask=is_part, other=float("-inf"), cache_modifier=".cg")
            masses = tl.load(stats + 2 * parts + 1, mask=is_part, other=0, cache_modifier=".cg")
            share = tl.exp2(tops - tl.max(tops, axis=0))
            rows = partials + parts[:, None] * HEAD_DIM + d[None, :]
            mixes = tl.load(rows, mask=is_part[:, None] & is_d[None, :], other=0, cache_modifier=".cg")
            total = tl.sum(mixes * share[:, None], axis=0) / tl.sum(masses * share, axis=0)
            if gates is not None:
                total *= gate
            tl.store(out + stream * HEAD_DIM + d, total, mask=is_d)


@triton.jit
def _fold_tile(
    top, mass, mixed, k, v, slot, q_ring, q_sink, age, ring_slot, own_slot, end,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Take some slots into a softmax under way: its largest score, the sum below it, the values weighted."""
    score = tl.sum(k.to(tl.float32) * q_ring[None, :], axis=1)
    if SINKS > 0:
        if tl.min(slot, axis=0) < SINKS:
            score = tl.where(slot < SINKS, tl.sum(k.to(tl.float32) * q_sink[None, :], axis=1), score)
    back = ring_slot + SINKS - slot  # how many tokens ago this slot was written
    back = tl.where(back < 0, back + RING, back)
    filled = tl.minimum(age - SINKS, RING).to(tl.int32)
    in_window = (back <= filled) & (back < WINDOW) & (slot < end)
    is_seen = tl.where(slot < SINKS, slot < age, in_window) & (slot != own_slot)
    score = tl.where(is_seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=0))
    p = tl.exp2(score - new_top)
    fade = tl.exp2(top - new_top)
    mixed = mixed * fade + tl.sum(p[:, None] * v.to(tl.float32), axis=0)
    return new_top, mass * fade + tl.sum(p, axis=0), mixed


@triton.jit
def _is_last(arrival, expected: tl.constexpr):
    """Whether all other programs have stored their part before this one; leaves the counter at zero."""
    tl.debug_barrier()  # all of this program's threads have stored
    is_last = tl.atomic_add(arrival, 1, sem="acq_rel") == expected - 1
    if is_last:
        tl.store(arrival, 0)
    return is_last


@triton.jit
def _product(w, x):
    return tl.sum(w.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def _bias(bias, n, N: tl.constexpr):
    total = n.to(tl.float32) * 0
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    return total


@triton.jit
def _or_zero(values, at, inside):
    found = at.to(tl.float32) * 0
    if values is not None:
        found += tl.load(values + at, mask=inside, other=0)
    return found


@triton.jit
def _weight_rows(weight, n, k, N: tl.constexpr, K: tl.constexpr):
    inside = (n < N)[:, None] & (k < K)[None, :]
    return tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0)


@triton.jit
def _slot_rows(rows, slot, d, end, HEAD_DIM: tl.constexpr):
    inside = (slot < end)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(rows + slot[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    return x
