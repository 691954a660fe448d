"""A null slot beside attention whose kernels know none: it joins their softmax when that is done.

With p the weights among the tokens and ``kept`` = sigmoid(log-sum-exp - score), the weights beside the slot
are P = kept * p. Slow twin: ``sinktrain.model.attention.causal_with_null``.

Axes: batch, seq, head, head_dim.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sinktrain.model import kernels
from sinktrain.model.sinks.base import NullSlot

BLOCK_T, STEPS = 16, 16
"""Tokens that a program takes at once, and for sums how often."""


def take_null(mixed: Tensor, qkv: Tensor, lse: Tensor, kept: Tensor, null: NullSlot) -> None:
    """Let the slot join, in place of ``mixed``.

    Args:
        mixed: the tokens' attention, [batch, seq, hidden].
        qkv: rotated, [batch, seq, head, 3 * head_dim].
        lse: of the tokens' scores, float32[batch, head, seq].
        kept: takes what the slot leaves to the tokens, float32[batch, seq, head].
        null: ``NullSlot.in_front``, its parts dense.
    """
    batch, seq, num_heads, width = qkv.shape
    head_dim, rows = width // 3, batch * seq
    kernels.take_null[(triton.cdiv(rows, BLOCK_T), num_heads)](
        qkv, mixed, lse, *null, kept, rows, seq, num_heads, head_dim**-0.5,
        head_dim, triton.next_power_of_2(head_dim), BLOCK_T, num_warps=4,
    )  # fmt: skip


def null_gradients(
    gradient: Tensor,
    mixed: Tensor,
    kept: Tensor,
    qkv: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a null slot makes of the gradient to the output.

    With g that gradient and o the output, the gradient to a token's score is P_j (g . v_j - g . o), which is
    p_j (kept g . v_j - kept g . o): what the tokens' backward pass gives for the gradient kept * g and for o.

    Returns:
        The gradient to give to that pass; the one to each query's score of the slot, float32[batch, seq,
        head]; and those to the slot's key, value, and score, in a head's first dimension: float32[3, head,
        head_dim].
    """
    batch, seq, num_heads, width = qkv.shape
    head_dim, rows = width // 3, batch * seq
    block_d, blocks = triton.next_power_of_2(head_dim), triton.cdiv(rows, BLOCK_T * STEPS)
    to_tokens, to_scores = torch.empty_like(gradient), torch.empty_like(kept)
    sums = kept.new_empty(blocks, num_heads, 3, block_d)
    kernels.null_gradient[(blocks, num_heads)](
        gradient, mixed, kept, qkv, null_value, to_tokens, to_scores, sums, rows, num_heads,
        null_key is not None, head_dim, block_d, BLOCK_T, STEPS, num_warps=4,
    )  # fmt: skip
    to_score, to_key, to_value = sums.sum(0)[..., :head_dim].unbind(1)
    return to_tokens, to_scores, torch.stack((to_key * head_dim**-0.5, to_value, to_score))
