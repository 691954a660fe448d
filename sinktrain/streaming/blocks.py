"""How blocks of tokens attend to the cache of their stream: prefill and exact evaluation.

A query sees ring keys at their true distance, and sink keys at a distance that stops growing once
the cache is full. So it is rotated twice: at its stream position for the ring, and for the sinks at
its *rotary_pos*, ``min(age, sinks + window - 1)``. A null slot is met as a sink is: it stands in front
of the first token, takes no slot, and every query sees it under every layout.

Axes: batch, head, seq, slot, head_dim.

Source: StreamingLLM (arXiv 2309.17453) section 3.2, whose code caches unrotated keys and rotates
all of them at every token; the two agree exactly (tests/oracles.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.model.attention import with_first
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.places import Places, of_all_heads
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.model.sinks.base import NullSlot
from sinktrain.streaming.ring import RingCache, is_visible

MAX_SCORES = 2**27
"""Attention scores held at once, at most, unless a single token needs more."""


class BlockAttention:
    """Attention of a block of tokens that continue the streams of a cache; writes them into it.

    The block attends to the old ring plus itself before any slot is reused. Ring, sinks and a null slot
    share one softmax as ``sinktrain.model.places`` explains.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, num_tokens: int) -> None:
        layout = cache.layout
        self.cache, self.places = cache, Places(model, layout.sinks)
        self.ages = cache.age[:, None] + torch.arange(num_tokens, device=model.device)  # [batch, seq]
        self.num_slots = min(cache.max_age, cache.num_slots)
        key_ages = torch.cat((cache.held_ages(cache.age - 1, self.num_slots), self.ages), dim=1)
        visible = is_visible(key_ages[:, None], self.ages[:, :, None], layout)[:, None]
        # As an addend, because scaled_dot_product_attention would make one of a bool mask in every layer.
        num_nulls, num_keys = self.places.num_nulls, visible.shape[-1]
        shape = (*visible.shape[:-1], num_nulls + num_keys)
        self.mask = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.mask[..., num_nulls:].masked_fill_(~visible, -torch.inf)
        self.is_sink = (key_ages < layout.sinks)[:, None, :, None]
        self.scale = model.config.network.head_dim**-0.5

        dtype, steps = angle_dtype(model.dtype), model.rotary_steps
        at_sinks = self.ages.clamp(max=layout.num_slots - 1)
        self.at_ring = of_all_heads(rotary_angles(self.ages + cache.start_pos, steps, dtype))
        self.at_sinks = of_all_heads(rotary_angles(at_sinks, steps, dtype))
        is_sink = (self.ages < layout.sinks)[:, None, :, None]
        both = zip(self.at_sinks, self.at_ring, strict=True)
        self.at_own = [torch.where(is_sink, sink, ring) for sink, ring in both]
        self.rows = torch.arange(cache.batch_size, device=model.device)[:, None]
        self.write_slots = cache.slots(self.ages)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        key = apply_rotary(k, *self.at_own)
        keys = torch.cat((self.cache.keys[layer, :, :, : self.num_slots], key), dim=2)
        values = torch.cat((self.cache.values[layer, :, :, : self.num_slots], v), dim=2)
        self.cache.keys[layer][self.rows, :, self.write_slots] = key.transpose(1, 2)
        self.cache.values[layer][self.rows, :, self.write_slots] = v.transpose(1, 2)

        query = self.places.queries(q, self.at_ring, self.at_sinks)
        keys = self.places.keys(keys, self.is_sink)
        if null is not None:
            null_key, null_value = self.places.null(null, like=v)
            keys, values = with_first(null_key, keys), with_first(null_value, values)
        return attend(query, keys, values, self.mask, self.scale)


def advance(model: GPTNeoX, tokens: Tensor, cache: RingCache) -> Iterator[Tensor]:
    """Feed tokens of any number to the streams, block by block, writing the cache.

    Args:
        tokens: int64[batch, seq], the same number for every row.

    Yields:
        States before the head, float[batch, block, hidden]; their concatenation covers ``tokens``.
    """
    for block in torch.split(tokens, block_size(model, cache), dim=1):
        attention = BlockAttention(model, cache, block.shape[1])
        hidden = model.hidden(block, attention)
        cache.write_tokens(block)
        cache.shift_bounds(block.shape[1])
        yield hidden


def block_size(model: GPTNeoX, cache: RingCache) -> int:
    """Tokens fed at once: as many as the window where that is reasonable for the memory of the scores."""
    heads = model.config.network.num_attention_heads
    per_query = cache.batch_size * heads * (cache.layout.num_slots + 1)
    return max(1, min(cache.layout.window, 1024, MAX_SCORES // per_query))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention; values are padded to the keys' width, which lets the fused CPU kernel take them."""
    head_dim, extra = values.shape[-1], keys.shape[-1] - values.shape[-1]
    padded = F.pad(values, (0, extra)) if extra else values
    return F.scaled_dot_product_attention(query, keys, padded, attn_mask=mask, scale=scale)[..., :head_dim]
