"""Attention of training on less than all earlier tokens: on a window of them, on those of the same document.

Both train what a stream computes. Within a window, sinks and a null slot stand where they stand in a stream
under the layout sinks + window. Within documents, positions begin anew with each one, and every document sees
the model's sinks right in front of it: since keys and values of a sink depend on nothing else, that is a sink
token of its own for every document, and costs none.

Axes: batch, head, seq, head_dim; width as in ``sinktrain.model.places``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.model.attention import with_first
from sinktrain.model.places import Places, of_all_heads
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.model.sinks.base import NullSlot

if TYPE_CHECKING:
    from sinktrain.model.neox import GPTNeoX


@dataclass(frozen=True)
class Mask:
    """What a token sees besides the model's own sinks.

    Args:
        window: its newest tokens, itself included; all when None.
        document_end: the token that ends a document, which sees nothing of others; None for no documents.
    """

    window: int | None = None
    document_end: int | None = None


class MaskedAttention:
    """An ``Attend`` for a batch of samples, int64[batch, seq], the model's own sinks in front."""

    def __init__(self, model: GPTNeoX, tokens: Tensor, mask: Mask) -> None:
        self.model, num_sinks = model, len(model.sink_ids)
        ages = document_ages(tokens, num_sinks, mask.document_end)
        longest = ages if mask.window is None else ages.clamp(max=num_sinks + mask.window - 1)
        steps, dtype = model.rotary_steps, angle_dtype(model.dtype)
        self.at_token = of_all_heads(rotary_angles(ages, steps, dtype))
        self.at_sinks = of_all_heads(rotary_angles(longest, steps, dtype))
        position = torch.arange(tokens.shape[1], device=tokens.device)
        self.is_sink = (position < num_sinks)[None, None, :, None]
        back = position[:, None] - position
        seen = (back >= 0) & (back < ages[:, :, None] - num_sinks + 1)  # the document's, up to the token
        if mask.window is not None:
            seen &= back < mask.window
        self.visible = (seen | ((position < num_sinks) & (back >= 0)))[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        places = Places(self.model, len(self.model.sink_ids), [null])
        head_dim, visible = v.shape[-1], self.visible
        query = places.queries(q, self.at_token, self.at_sinks)
        keys = places.keys(apply_rotary(k, *self.at_token), self.is_sink)
        if null is not None:
            first_key, first_value = places.null(null, v)
            keys, v = with_first(first_key, keys), with_first(first_value, v)
            visible = F.pad(visible, (1, 0), value=True)
        values = F.pad(v, (0, keys.shape[-1] - head_dim))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=head_dim**-0.5)
        return mixed[..., :head_dim]


def document_ages(tokens: Tensor, num_sinks: int, document_end: int | None) -> Tensor:
    """How many tokens stand before each in its document, sinks counted: int64[batch, seq], as ``tokens``."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    if document_end is None:
        return position.expand_as(tokens)
    ended = F.pad(tokens[:, :-1] == document_end, (1, 0)) & (position > num_sinks)
    starts = torch.where(ended, position - num_sinks, 0).cummax(dim=1).values
    return torch.where(position < num_sinks, position, position - starts)
