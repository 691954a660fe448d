"""What training on CUDA does faster than its plain form: rotation, and the loss without the logits.

Slow twins: ``apply_rotary`` and ``token_losses``. Measured on an H100 80GB, 160m, micro-batch 32: left to
torch.compile, rotations took 26 of 152 ms; the logits of a whole batch would hold 6 GiB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sinktrain.data.windows import IGNORED
from sinktrain.model import kernels
from sinktrain.model.devices import add_product

LOGITS_BYTES = 2**30
"""Logits held at once."""
CHUNK_ROWS = 256
"""Chunks are multiples of these, so that matrix products have whole tiles."""
SOFTMAX_BLOCK, SOFTMAX_WARPS = 8192, 16


# -- rotation -------------------------------------------------------------------------------------


@torch.library.custom_op("sinktrain::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """``apply_rotary`` for float[batch, head, seq, head_dim]; turned back with ``sign`` -1.

    The result lies in memory as [batch, seq, head, head_dim], which attention then keeps.
    """
    batch, heads, seq, head_dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = _rotated_like(x)
    half = cos.shape[-1] // 2
    kernels.rotate_heads[(batch * seq,)](
        x, cos, sin, out, x.stride(0), x.stride(2), x.stride(1), seq, heads, sign,
        half, max(1, triton.next_power_of_2(half)), head_dim, triton.next_power_of_2(head_dim),
        triton.next_power_of_2(heads),
        num_warps=1 if heads * head_dim <= 1024 else 2,
    )  # fmt: skip
    return out


def _rotated_like(x: Tensor) -> Tensor:
    batch, heads, seq, head_dim = x.shape
    return x.new_empty(batch, seq, heads, head_dim).transpose(1, 2)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    return _rotated_like(x)


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return rotate(gradient, *ctx.saved_tensors, -ctx.sign), None, None, None


rotate.register_autograd(_rotate_back, setup_context=_keep_angles)


# -- loss -----------------------------------------------------------------------------------------


@torch.library.custom_op("sinktrain::linear_loss", mutates_args=())
def linear_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies, in nats, of ``token_losses(hidden @ weight.T, targets)``: float32[].

    Args:
        hidden: float[rows, hidden].
        weight: float[vocab, hidden], cast to the dtype of ``hidden``.
        targets: int64[rows]; ``IGNORED`` where nothing is scored.
    """
    head = weight.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for rows in _chunks(hidden, weight):
        _softmax(hidden[rows] @ head.t(), targets[rows], losses[rows], with_gradient=False)
    return losses.sum()


@torch.library.custom_op("sinktrain::linear_loss_and_gradients", mutates_args=())
def linear_loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_loss`` and its gradients, taken while the logits are there.

    Returns:
        The loss; the gradient to ``hidden``, like it; the gradient to ``weight``, in float32.
    """
    head = weight.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    to_hidden = torch.empty_like(hidden)
    to_weight = torch.zeros_like(weight, dtype=torch.float32)
    for rows in _chunks(hidden, weight):
        logits = hidden[rows] @ head.t()
        _softmax(logits, targets[rows], losses[rows], with_gradient=True)  # its gradient, from here on
        torch.mm(logits, head, out=to_hidden[rows])
        add_product(to_weight, logits.t(), hidden[rows])
    return losses.sum(), to_hidden, to_weight


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows, as evenly as they divide, whose logits fit into ``LOGITS_BYTES``."""
    num_bytes = len(hidden) * len(weight) * hidden.element_size()
    rows = triton.cdiv(len(hidden), triton.cdiv(num_bytes, LOGITS_BYTES))
    rows = triton.cdiv(rows, CHUNK_ROWS) * CHUNK_ROWS
    return [slice(first, first + rows) for first in range(0, len(hidden), rows)]


def _softmax(logits: Tensor, targets: Tensor, losses: Tensor, with_gradient: bool) -> None:
    kernels.softmax_gradient[(len(logits),)](
        logits, targets.contiguous(), losses, logits.shape[1], IGNORED,
        with_gradient, min(SOFTMAX_BLOCK, triton.next_power_of_2(logits.shape[1])), num_warps=SOFTMAX_WARPS,
    )  # fmt: skip


@linear_loss.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return hidden.new_empty((), dtype=torch.float32)


@linear_loss_and_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden),
        torch.empty_like(weight, dtype=torch.float32),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
    to_hidden, to_weight = ctx.saved_tensors
    scaled = to_hidden.float() * upstream  # upstream itself is not rounded: that would scale all of it
    return scaled.to(to_hidden.dtype), (to_weight * upstream).to(ctx.weight_dtype), None


linear_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)
