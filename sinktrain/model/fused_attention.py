"""Causal attention of training on a Hopper GPU, from a layer's normalised input to its mixed values.

The projection belongs to it so that queries and keys may be rotated where the projection wrote them, and
their gradients gathered, rotated back and summed for the bias in one pass. Measured on an H100 80GB, 160m,
micro-batch 32: kernels take 1.4 of 131.7 ms less, and a step 2.3 of 23.5 GiB, than with these apart.

Slow twin: ``sinktrain.model.attention.CausalAttention`` on the projected queries, keys and values.
Axes: batch, seq, head, head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from sinktrain.model import kernels
from sinktrain.model.devices import float32_product
from sinktrain.model.fused_null import null_gradients, take_null
from sinktrain.model.sinks.base import NullSlot

BLOCK_T, STEPS = 16, 16
"""Tokens whose gradients a program joins at once, and how often."""
MOST_HEAD_DIM = 128
"""What cuDNN's backward pass takes."""


def is_served(device: torch.device, dtype: torch.dtype, head_dim: int, rotary_ndims: int) -> bool:
    """Whether cuDNN has its fast kernels for this; they are not deterministic, which may be asked for."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= MOST_HEAD_DIM
        and head_dim % 8 == 0
        and rotary_ndims > 0
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not torch.are_deterministic_algorithms_enabled()
    )


@torch.library.custom_op("sinktrain::projected_attention", mutates_args=())
def projected_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    has_null: bool = False,
    null_key: Tensor | None = None,
    null_score: Tensor | None = None,
    null_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Project to queries, keys and values, rotate, attend.

    Args:
        x: bfloat16 or float16[batch, seq, hidden].
        weight, bias: of the projection, float[3 * hidden, hidden] and float[3 * hidden], cast as ``x``.
        cos, sin: float32[seq, rotary_ndims].
        has_null: whether there is a null slot, whose parts, dense, come next: ``NullSlot.in_front``.

    Returns:
        Mixed values, [batch, seq, hidden]; and for the backward pass the rotated projection,
        [batch, seq, head, 3 * head_dim], the tokens' log-sum-exp, float32[batch, head, seq], and what a null
        slot leaves to the tokens, float32[batch, seq, head], empty without one.
    """
    batch, seq, hidden = x.shape
    qkv = torch.addmm(bias.to(x.dtype), x.view(-1, hidden), weight.to(x.dtype).t())
    qkv = qkv.view(batch, seq, num_heads, -1)
    rotate_in_place(qkv, cos, sin)
    mixed, lse = causal_attention(*_heads(qkv))
    mixed = mixed.transpose(1, 2).reshape(batch, seq, hidden)
    kept = lse.new_empty(batch, seq, num_heads) if has_null else lse.new_empty(0)
    if has_null:
        take_null(mixed, qkv, lse, kept, NullSlot(null_key, null_score, null_value))
    return mixed, qkv, lse, kept


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output, [batch, head, seq, head_dim], and log-sum-exp, float32[batch, head, seq]; on CUDA by cuDNN."""
    attend: Any = torch.ops.aten
    if q.device.type == "cuda":
        mixed, lse, *_ = attend._scaled_dot_product_cudnn_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=True
        )
        return mixed, lse.reshape(q.shape[:3])
    mixed, lse = attend._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
    return mixed, lse.contiguous()


def causal_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to ``q``, ``k`` and ``v``; all are [batch, head, seq, head_dim]."""
    seq = q.shape[2]
    attend: Any = torch.ops.aten
    if q.device.type == "cuda":
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # random state, for dropout
        dq, dk, dv = attend._scaled_dot_product_cudnn_attention_backward(
            gradient, q, k, v, mixed, lse.unsqueeze(-1), unused, unused, None, None, None, seq, seq, 0.0, True
        )
    else:
        dq, dk, dv = attend._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, mixed, lse, 0.0, True
        )
    return dq, dk, dv


def rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys by their positions: float[batch, seq, head, 3 * head_dim], dense."""
    batch, seq, num_heads, width = qkv.shape
    half = cos.shape[-1] // 2
    kernels.rotate_in_place[(batch * seq,)](
        qkv, cos, sin, seq, num_heads,
        half, triton.next_power_of_2(half), width // 3, triton.next_power_of_2(num_heads), num_warps=1,
    )  # fmt: skip


def join_gradients(
    gradients: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    to_scores: Tensor | None = None,
    null_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients to what was projected.

    Args:
        gradients: to rotated queries and keys and to values, each float[batch, head, seq, head_dim].
        to_scores: gradient to each query's score of a null slot, float32[batch, seq, head].
        null_key: of that slot, [head, head_dim]; None where it has none.

    Returns:
        To queries, keys and values, float[batch, seq, head, 3 * head_dim], and their sum over the tokens,
        float32[head * 3 * head_dim].
    """
    dq, dk, dv = (one.transpose(1, 2).contiguous() for one in gradients)
    batch, seq, num_heads, head_dim = dq.shape
    blocks = triton.cdiv(batch * seq, BLOCK_T * STEPS)
    joined = dq.new_empty(batch, seq, num_heads, 3 * head_dim)
    sums = dq.new_empty(blocks, num_heads * 3 * head_dim, dtype=torch.float32)
    kernels.join_gradients[(blocks, num_heads)](
        dq, dk, dv, cos, sin, to_scores, null_key, joined, sums, batch * seq, seq, num_heads, head_dim**-0.5,
        cos.shape[-1] // 2, head_dim, triton.next_power_of_2(head_dim), BLOCK_T, STEPS, num_warps=4,
    )  # fmt: skip
    return joined, sums.sum(0)


def _heads(qkv: Tensor) -> list[Tensor]:
    """Queries, keys and values as attention takes them: views [batch, head, seq, head_dim]."""
    return list(qkv.transpose(1, 2).chunk(3, dim=-1))


@projected_attention.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    has_null: bool = False,
    *null: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq, _ = x.shape
    qkv = x.new_empty(batch, seq, num_heads, len(weight) // num_heads)
    lse = x.new_empty(batch, num_heads, seq, dtype=torch.float32)
    kept = lse.new_empty(batch, seq, num_heads) if has_null else lse.new_empty(0)
    return torch.empty_like(x), qkv, lse, kept


@torch.library.custom_op("sinktrain::projected_attention_backward", mutates_args=())
def projected_attention_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    mixed: Tensor,
    qkv: Tensor,
    lse: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``x``, in its dtype, and to ``weight`` and ``bias``, in float32.

    The last one is float32[3, head, head_dim]: to a null slot's key, to its value, and to its score, in the
    first dimension of each head; empty without a slot.
    """
    batch, seq, num_heads, width = qkv.shape
    head_dim, rows = width // 3, batch * seq
    by_head = (batch, seq, num_heads, head_dim)
    to_scores, to_null = None, kept.new_empty(0)
    if len(kept):
        gradient, to_scores, to_null = null_gradients(gradient, mixed, kept, qkv, null_key, null_value)
    q, k, v = _heads(qkv)
    gradients = causal_attention_backward(
        gradient.view(by_head).transpose(1, 2), q, k, v, mixed.view(by_head).transpose(1, 2), lse
    )
    joined, to_bias = join_gradients(gradients, cos, sin, to_scores, null_key)
    flat = joined.view(rows, -1)
    to_x = torch.mm(flat, weight.to(x.dtype))
    to_weight = float32_product(flat.t(), x.view(rows, -1))
    return to_x.view_as(x), to_weight, to_bias, to_null


@projected_attention_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    mixed: Tensor,
    qkv: Tensor,
    lse: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_weight = torch.empty_like(weight, dtype=torch.float32)
    num_heads, head_dim = qkv.shape[2], qkv.shape[3] // 3
    to_null = kept.new_empty(3, num_heads, head_dim) if len(kept) else kept.new_empty(0)
    return torch.empty_like(x), to_weight, to_weight.new_empty(len(weight)), to_null


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, cos, sin, _, _, key, score, value = inputs
    ctx.score_dtype = None if score is None else score.dtype
    ctx.save_for_backward(x, weight, cos, sin, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin, key, value, *rest = ctx.saved_tensors
    to_x, to_weight, to_bias, to_null = projected_attention_backward(
        gradient.contiguous(), x, weight, cos, sin, key, value, *rest
    )
    to_key = None if key is None else to_null[0].to(key.dtype)
    to_value = None if value is None else to_null[1].to(value.dtype)
    to_score = None if ctx.score_dtype is None else to_null[2, :, 0].to(ctx.score_dtype)
    own = (to_x, to_weight.to(weight.dtype), to_bias.to(weight.dtype))
    return (*own, None, None, None, None, to_key, to_score, to_value)


projected_attention.register_autograd(_backward, setup_context=_keep)
