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


class Attend(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer, from 0.
            q, k, v: float[batch, head, seq, head_dim], unrotated.

        Returns:
            float[batch, head, seq, head_dim].
        """
        ...


class CausalAttention:
    """Every token sees itself and all before it, at positions 0, 1, 2, …: training and dense inference."""

    def __init__(self, rotary_steps: Tensor, seq_len: int, dtype: torch.dtype) -> None:
        rotary_pos = torch.arange(seq_len, device=rotary_steps.device)
        self.cos, self.sin = rotary_angles(rotary_pos, rotary_steps, angle_dtype(dtype))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if has_fast_path(q):
            from sinktrain.model.fused import rotate

            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        else:
            q, k = apply_rotary(q, self.cos, self.sin), apply_rotary(k, self.cos, self.sin)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def from_input(self, x: Tensor, projection: nn.Linear, num_heads: int) -> Tensor | None:
        """The same from a layer's normalised input, in one piece, where training has that; else None.

        Args:
            x: float[batch, seq, hidden].
            projection: to queries, keys and values, interleaved per head.

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
        mixed: Tensor = projected_attention(x.to(dtype), *weights, self.cos, self.sin, num_heads)[0]
        return mixed
