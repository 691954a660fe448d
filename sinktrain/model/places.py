"""Where a product of queries and keys finds the rotation that each kind of key is met with.

A query meets ring keys at their true distance, and sinks and a null slot at a distance that stops growing
once the cache is full. One softmax takes them all, because the rotated dimensions of a key are moved to one
of two places, and a null slot's score has dimensions of its own,

    ring key   [rotated at stream_pos | passed through | 0                       | 0    ]
    sink key   [0                     | passed through | rotated at its slot     | 0    ]
    null slot  [0                     | passed through | rotated to position -1  | score]
    query      [rotated at stream_pos | passed through | rotated at rotary_pos   | 1    ]

so that a plain dot product picks what belongs together. A part that a model or layout lacks is left out.

Axes: batch, head, seq, slot, head_dim; width is head_dim and what is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.model.attention import SCORE_DIMS, score_dims, score_mark
from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.rotary import apply_rotary
from sinktrain.model.sinks.base import NullSlot

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of ``rotary_angles``."""


class Places:
    """The places of one model's keys.

    Args:
        num_sinks: keys that are met like sinks, besides a null slot.
        nulls: some layers' null slots; the model's own when None, which none may ask while it is in shards.

    Attributes:
        num_nulls: 1 if the model has null slots, else 0.
        rotary_ndims: dimensions of the second rotation; 0 where nothing is met with it.
        width: dimensions of a placed key.
    """

    def __init__(
        self, model: GPTNeoX, num_sinks: int, nulls: Sequence[NullSlot | None] | None = None
    ) -> None:
        network, null = model.config.network, (null_slots(model) if nulls is None else nulls)[0]
        is_met_twice = num_sinks > 0 or (null is not None and null.key is not None)
        self.num_nulls = int(null is not None)
        self.rotary_ndims = network.rotary_ndims if is_met_twice else 0
        self.width = network.head_dim + self.rotary_ndims
        self.has_score = null is not None and null.score is not None
        self.width += SCORE_DIMS * self.has_score
        self.rotary_steps = model.rotary_steps

    def queries(self, q: Tensor, at_ring: Angles, at_sinks: Angles) -> Tensor:
        """float[batch, head, seq, head_dim], unrotated -> float[batch, head, seq, width]."""
        parts = [apply_rotary(q, *at_ring)]
        if self.rotary_ndims:
            parts.append(apply_rotary(q, *at_sinks)[..., : self.rotary_ndims])
        if self.has_score:
            parts.append(score_mark(q))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def keys(self, keys: Tensor, is_sink: Tensor) -> Tensor:
        """Place rotated keys.

        Args:
            keys: float[batch, head, slot, head_dim].
            is_sink: bool[batch, 1, slot, 1].

        Returns:
            float[batch, head, slot, width].
        """
        if self.rotary_ndims:
            rotated, passed = keys[..., : self.rotary_ndims], keys[..., self.rotary_ndims :]
            parts = (rotated.masked_fill(is_sink, 0), passed, rotated.masked_fill(~is_sink, 0))
            keys = torch.cat(parts, dim=-1)
        extra = self.width - keys.shape[-1]
        return F.pad(keys, (0, extra)) if extra else keys

    def null(self, null: NullSlot, like: Tensor) -> tuple[Tensor, Tensor]:
        """A null slot's placed key, and its value: float[head, 1, width] and float[head, 1, head_dim].

        Args:
            like: float[batch, head, seq, head_dim], values of its layer.
        """
        (_, num_heads, _, head_dim), dtype = like.shape, like.dtype
        key, value = (
            like.new_zeros(num_heads, head_dim) if part is None else part.to(dtype)
            for part in (null.in_front(self.rotary_steps).key, null.value)
        )
        rotated, passed = key[:, : self.rotary_ndims], key[:, self.rotary_ndims :]
        parts = [torch.zeros_like(rotated), passed, rotated]
        if null.score is not None:
            parts.append(score_dims(null.score, head_dim, dtype))
        return torch.cat(parts, dim=-1)[:, None], value[:, None]


def null_slots(model: GPTNeoX) -> list[NullSlot | None]:
    """Each layer's null slot; all layers have one with the same parts, or none has."""
    layers = model.gpt_neox.layers
    return [layer.attention.sink.null_slot() for layer in layers if isinstance(layer, Layer)]


def of_all_heads(angles: Angles) -> Angles:
    """float[batch, seq, rotary_ndims] -> float[batch, 1, seq, rotary_ndims]."""
    cos, sin = angles
    return cos[:, None], sin[:, None]
