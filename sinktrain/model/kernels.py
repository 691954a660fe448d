"""Triton kernels of training: the rotation of queries and keys, and a softmax that becomes its gradient.

Axes: batch, seq, head, head_dim (d); a row is one token of a batch, an entry one of the vocabulary.

Slow twins: ``sinktrain.model.rotary.apply_rotary`` and ``sinktrain.model.loss.token_losses``; on the CPU,
Triton's interpreter runs these.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + entry < vocab_size
        x = tl.load(logits + start + entry, mask=inside, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    peak = tl.max(top, 0)
    sum_of_all = tl.sum(total * tl.exp(top - peak), 0)
    chosen = tl.load(logits + tl.where(is_scored, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(is_scored, peak + tl.log(sum_of_all) - chosen, 0.0))
    if WITH_GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        share = tl.where(is_scored, 1.0 / sum_of_all, 0.0)
        for start in range(0, vocab_size, BLOCK):
            inside = start + entry < vocab_size
            x = tl.load(logits + start + entry, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - peak) * share - tl.where(start + entry == target, 1.0, 0.0)
            tl.store(logits + start + entry, gradient.to(logits.dtype.element_ty), mask=inside)
