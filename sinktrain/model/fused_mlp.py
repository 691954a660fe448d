"""The MLP of training on CUDA: what GELU gives is computed again for the backward pass instead of kept.

It costs nothing there, because the gradient of GELU reads the same values; kept, it was 4.5 of 21 GiB at
160m with a micro-batch of 32. The kernel sums the gradient of the bias on its way, too.

Slow twin: ``sinktrain.model.neox.MLP``. Axes: batch, seq, hidden, width (of the intermediate layer).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from sinktrain.model import kernels
from sinktrain.model.devices import float32_product

BLOCK_M, BLOCK_N, STEPS = 4, 512, 32


@torch.library.custom_op("sinktrain::gelu_mlp", mutates_args=())
def gelu_mlp(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor]:
    """``gelu(x @ up.T + up_bias) @ down.T``; weights are cast to the dtype of ``x``.

    Args:
        x: float[batch, seq, hidden].
        up_weight, up_bias: float[width, hidden], float[width].
        down_weight: float[hidden, width].

    Returns:
        Like ``x``; and for the backward pass what GELU is taken of, [batch x seq, width].
    """
    dtype = x.dtype
    pre = torch.addmm(up_bias.to(dtype), x.reshape(-1, x.shape[-1]), up_weight.to(dtype).t())
    out = F.gelu(pre) @ down_weight.to(dtype).t()
    return out.view(x.shape), pre


@gelu_mlp.register_fake
def _(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty(rows, len(up_weight))


@torch.library.custom_op("sinktrain::gelu_mlp_backward", mutates_args=())
def gelu_mlp_backward(
    gradient: Tensor, x: Tensor, pre: Tensor, up_weight: Tensor, down_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``x``, in its dtype, and in float32 to ``up_weight``, ``up_bias`` and ``down_weight``."""
    flat_x, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
    to_pre = flat @ down_weight.to(x.dtype)
    act = torch.empty_like(pre)
    rows, width = pre.shape
    blocks = triton.cdiv(rows, BLOCK_M * STEPS)
    sums = torch.empty(blocks, width, dtype=torch.float32, device=x.device)
    kernels.gelu_gradient[(triton.cdiv(width, BLOCK_N), blocks)](
        pre, to_pre, act, sums, rows, width, BLOCK_M, BLOCK_N, STEPS, num_warps=4
    )
    to_down = float32_product(flat.t(), act)
    del act
    to_up = float32_product(to_pre.t(), flat_x)
    to_x = to_pre @ up_weight.to(x.dtype)
    return to_x.view(x.shape), to_up, sums.sum(0), to_down


@gelu_mlp_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, pre: Tensor, up_weight: Tensor, down_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_up, to_down = (torch.empty_like(weight, dtype=torch.float32) for weight in (up_weight, down_weight))
    return x.new_empty(x.shape), to_up, to_up.new_empty(len(to_up)), to_down


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, up_weight, _, down_weight = inputs
    ctx.save_for_backward(x, output[1], up_weight, down_weight)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, ...]:
    dtype = ctx.saved_tensors[2].dtype
    to_x, *to_weights = gelu_mlp_backward(gradient, *ctx.saved_tensors)
    return to_x, *(to_weight.to(dtype) for to_weight in to_weights)


gelu_mlp.register_autograd(_backward, setup_context=_keep)
