"""How queries meet keys: the causal attention of training, and what streaming puts in its place.

The network hands each layer's *unrotated* queries and keys to an ``Attend``; positions are its
business, because in a stream they depend on the cache.

Axes: batch, head, seq, head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinktrain.model.devices import compute_dtype, has_fast_path
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.model.sinks.base import NullSlot

SCORE_DIMS = 8
"""Dimensions that carry a null slot's score: it and what rounding took of it; 8 keep rows aligned."""


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer, from 0.
            q, k, v: float[batch, head, seq, head_dim], unrotated.
            null: a slot that every query sees besides.

        Returns:
            float[batch, head, seq, head_dim].
        """
        ...


class CausalAttention:
    """Every token sees itself and all before it, at positions 0, 1, 2, …: training and dense inference."""

    def __init__(self, rotary_steps: Tensor, seq_len: int, dtype: torch.dtype) -> None:
        rotary_pos = torch.arange(seq_len, device=rotary_steps.device)
        self.rotary_steps = rotary_steps
        self.cos, self.sin = rotary_angles(rotary_pos, rotary_steps, angle_dtype(dtype))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        if has_fast_path(q):
            from sinktrain.model.fused import rotate

            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        else:
            q, k = apply_rotary(q, self.cos, self.sin), apply_rotary(k, self.cos, self.sin)
        if null is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return causal_with_null(q, k, v, null.in_front(self.rotary_steps))

    def from_input(
        self, x: Tensor, projection: nn.Linear, num_heads: int, null: NullSlot | None = None
    ) -> Tensor | None:
        """The same from a layer's normalised input, in one piece, where training has that; else None.

        Args:
            x: float[batch, seq, hidden].
            projection: to queries, keys and values, interleaved per head.
            null: as in ``Attend``.

        Returns:
            float[batch, seq, hidden].
        """
        dtype = compute_dtype(x)
        if not (torch.is_grad_enabled() and has_fast_path(x)) or projection.bias is None:
            return None
        from sinktrain.model.fused_attention import is_served, projected_attention

        if not is_served(x.device, dtype, x.shape[-1] // num_heads, self.cos.shape[-1]):
            return None
        weights = projection.weight, projection.bias
        parts = (None,) * 3 if null is None else null.in_front(self.rotary_steps)
        mixed: Tensor = projected_attention(
            x.to(dtype), *weights, self.cos, self.sin, num_heads, null is not None, *parts
        )[0]
        return mixed


def causal_with_null(q: Tensor, k: Tensor, v: Tensor, null: NullSlot) -> Tensor:
    """Causal attention with a null slot, which is the first key; a first query, which sees it alone, goes.

    Args:
        q, k, v: float[batch, head, seq, head_dim], rotated.
        null: its key rotated too.

    Returns:
        float[batch, head, seq, head_dim].
    """
    num_heads, head_dim = q.shape[1], q.shape[3]
    no_part = q.new_zeros(num_heads, head_dim)
    key, value = (no_part if part is None else part.to(q.dtype) for part in (null.key, null.value))
    if null.score is not None:
        q = torch.cat((q, score_mark(q)), dim=-1)
        key = torch.cat((key, score_dims(null.score, head_dim, q.dtype)), dim=-1)
    extra = q.shape[-1] - head_dim
    k = with_first(key[:, None], F.pad(k, (0, extra)))
    v = with_first(F.pad(value, (0, extra))[:, None], F.pad(v, (0, extra)))
    q = F.pad(q, (0, 0, 1, 0))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=head_dim**-0.5)
    return mixed[:, :, 1:, :head_dim]


def score_dims(score: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Dimensions of a null slot's key that make its score: float[head] -> dtype[head, SCORE_DIMS].

    They hold it and what rounding took of it, times what attention's scale takes away again.
    """
    score = score.to(angle_dtype(dtype)) * head_dim**0.5
    rounded = score.to(dtype)
    parts = torch.stack((rounded, (score - rounded).to(dtype)), dim=-1)
    return F.pad(parts, (0, SCORE_DIMS - 2))


def score_mark(q: Tensor) -> Tensor:
    """What queries have in those dimensions: [batch, head, seq, SCORE_DIMS], like ``q`` otherwise."""
    return F.pad(q.new_ones(2), (0, SCORE_DIMS - 2)).expand(*q.shape[:-1], -1)


def with_first(first: Tensor, rest: Tensor) -> Tensor:
    """float[head, 1, …] in front of float[batch, head, seq, …]."""
    return torch.cat((first.expand(len(rest), -1, -1, -1), rest), dim=2)
