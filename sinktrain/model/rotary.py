"""Rotary positions: angles that stay exact at any stream position, and the rotation itself.

Axes: batch, head, seq, head_dim; rotary_ndims is the rotated share of head_dim, in halves layout.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor

TURN = 2**64
TAU = Decimal("6.28318530717958647692528676655900576839433879875021")


def phase_steps(rotary_ndims: int, base: float) -> Tensor:
    """Angle that one position adds, per frequency, in 2^-64ths of a turn: int64[rotary_ndims / 2] on the CPU.

    A 64-bit integer wraps exactly where a turn does. So the angle between two positions depends on
    their distance alone, however far the stream is, and the angle of position p is off by p * 2^-65
    of a turn at most: 2e-7 rad at 2^40, where float32 has long lost count. The steps are computed in
    decimals because float64 frequencies would make that 1e-4 rad.
    """
    with localcontext(prec=40):
        exponents = (Decimal(-2 * i) / rotary_ndims for i in range(rotary_ndims // 2))
        steps = [round(Decimal(base) ** exponent / TAU * TURN) for exponent in exponents]
    return torch.tensor([_as_signed(step) for step in steps], dtype=torch.int64, device="cpu")


def rotary_angles(rotary_pos: Tensor, steps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles.

    Args:
        rotary_pos: int64[..., seq].
        steps: int64[rotary_ndims / 2] from ``phase_steps``, on the same device.
        dtype: float64 for float64 models, otherwise float32.

    Returns:
        cos, sin: dtype[..., seq, rotary_ndims], the second half repeating the first.

    Source: RoFormer (arXiv 2104.09864) section 3.4.2.
    """
    phase = rotary_pos.unsqueeze(-1) * steps
    angle = phase.to(torch.float64) * (math.tau / TURN)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def angle_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that angles and rotations are computed in for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``rotary_ndims`` of each head; the rest passes through.

    Args:
        x: float[batch, head, seq, head_dim].
        cos, sin: float[seq, rotary_ndims] or anything that broadcasts to it over batch and head.

    Returns:
        Same shape and dtype as ``x``; the rotation itself is computed in the dtype of ``cos``.
    """
    rotary_ndims = cos.shape[-1]
    rotated, passed = x[..., :rotary_ndims], x[..., rotary_ndims:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), passed), dim=-1)


def _as_signed(value: int) -> int:
    """The int64 with the same 64 bits as ``value`` modulo 2^64."""
    value %= TURN
    return value - TURN if value >= TURN // 2 else value
