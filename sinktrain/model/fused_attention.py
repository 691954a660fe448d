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
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project to queries, keys and values, rotate, attend.

    Args:
        x: bfloat16 or float16[batch, seq, hidden].
        weight, bias: of the projection, float[3 * hidden, hidden] and float[3 * hidden], cast as ``x``.
        cos, sin: float32[seq, rotary_ndims].

    Returns:
        Mixed values, [batch, seq, hidden]; and for the backward pass the rotated projection,
        [batch, seq, head, 3 * head_dim], and the log-sum-exp, float32[batch, head, seq].
    """
    batch, seq, hidden = x.shape
    qkv = torch.addmm(bias.to(x.dtype), x.view(-1, hidden), weight.to(x.dtype).t())
    qkv = qkv.view(batch, seq, num_heads, -1)
    rotate_in_place(qkv, cos, sin)
    q, k, v = _heads(qkv)
    mixed, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, compute_log_sumexp=True, is_causal=True
    )
    return mixed.transpose(1, 2).reshape(batch, seq, hidden), qkv, lse.reshape(batch, num_heads, seq)


def rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys by their positions: float[batch, seq, head, 3 * head_dim], dense."""
    batch, seq, num_heads, width = qkv.shape
    half = cos.shape[-1] // 2
    kernels.rotate_in_place[(batch * seq,)](
        qkv, cos, sin, seq, num_heads,
        half, triton.next_power_of_2(half), width // 3, triton.next_power_of_2(num_heads), num_warps=1,
    )  # fmt: skip


def join_gradients(gradients: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to what was projected.

    Args:
        gradients: to rotated queries and keys and to values, each float[batch, head, seq, head_dim].

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
        dq, dk, dv, cos, sin, joined, sums, batch * seq, seq, num_heads,
        cos.shape[-1] // 2, head_dim, triton.next_power_of_2(head_dim), BLOCK_T, STEPS, num_warps=4,
    )  # fmt: skip
    return joined, sums.sum(0)


def _heads(qkv: Tensor) -> list[Tensor]:
    """Queries, keys and values as attention takes them: views [batch, head, seq, head_dim]."""
    return list(qkv.transpose(1, 2).chunk(3, dim=-1))


@projected_attention.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq, _ = x.shape
    qkv = x.new_empty(batch, seq, num_heads, len(weight) // num_heads)
    return torch.empty_like(x), qkv, x.new_empty(batch, num_heads, seq, dtype=torch.float32)


@torch.library.custom_op("sinktrain::projected_attention_backward", mutates_args=())
def projected_attention_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    mixed: Tensor,
    qkv: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to ``x``, in its dtype, and to ``weight`` and ``bias``, in float32."""
    batch, seq, num_heads, width = qkv.shape
    head_dim, rows = width // 3, batch * seq
    by_head = (batch, seq, num_heads, head_dim)
    unused = torch.zeros((), dtype=torch.int64, device=x.device)  # random state, for dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        gradient.view(by_head).transpose(1, 2), *_heads(qkv), mixed.view(by_head).transpose(1, 2),
        lse.unsqueeze(-1), unused, unused, None, None, None, seq, seq, 0.0, True,
    )  # fmt: skip
    joined, to_bias = join_gradients(gradients, cos, sin)
    flat = joined.view(rows, -1)
    to_x = torch.mm(flat, weight.to(x.dtype))
    to_weight = float32_product(flat.t(), x.view(rows, -1))
    return to_x.view_as(x), to_weight, to_bias


@projected_attention_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    mixed: Tensor,
    qkv: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    to_weight = torch.empty_like(weight, dtype=torch.float32)
    return torch.empty_like(x), to_weight, to_weight.new_empty(len(weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, cos, sin, _ = inputs
    ctx.save_for_backward(x, weight, cos, sin, *output)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, *rest = ctx.saved_tensors
    to_x, to_weight, to_bias = projected_attention_backward(gradient.contiguous(), x, weight, *rest)
    return to_x, to_weight.to(weight.dtype), to_bias.to(weight.dtype), None, None, None


projected_attention.register_autograd(_backward, setup_context=_keep)
