"""How blocks of tokens attend to the cache of their stream: prefill and exact evaluation.

A query sees ring keys at their true distance, and sink keys at a distance that stops growing once
the cache is full. So it is rotated twice: at its stream position for the ring, and for the sinks at
its *rotary_pos*, ``min(age, sinks + window - 1)``.

Axes: batch, head, seq, slot, head_dim.

Source: StreamingLLM (arXiv 2309.17453) section 3.2, whose code caches unrotated keys and rotates
all of them at every token; the two agree exactly (tests/oracles.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.streaming.ring import RingCache, is_visible

MAX_SCORES = 2**27
"""Attention scores held at once, at most, unless a single token needs more."""


class BlockAttention:
    """Attention of a block of tokens that continue the streams of a cache; writes them into it.

    The block attends to the old ring plus itself before any slot is reused. Ring and sinks share one
    softmax because the rotated dimensions of a key are moved to one of two places,

        ring key   [rotated at stream_pos | passed through | 0]
        sink key   [0                     | passed through | rotated at its slot]
        query      [rotated at stream_pos | passed through | rotated at rotary_pos]

    so that a plain dot product picks the right rotation of the query.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, num_tokens: int) -> None:
        layout, network = cache.layout, model.config.network
        self.cache = cache
        self.ages = cache.age[:, None] + torch.arange(num_tokens, device=model.device)  # [batch, seq]
        self.num_slots = min(cache.max_age, cache.num_slots)
        key_ages = torch.cat((cache.held_ages(cache.age - 1, self.num_slots), self.ages), dim=1)
        visible = is_visible(key_ages[:, None], self.ages[:, :, None], layout)[:, None]
        # As an addend, because scaled_dot_product_attention would make one of a bool mask in every layer.
        self.mask = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
        self.mask.masked_fill_(~visible, -torch.inf)
        self.is_sink = (key_ages < layout.sinks)[:, None, :, None] if layout.sinks else None
        self.rotary_ndims, self.scale = network.rotary_ndims, network.head_dim**-0.5

        dtype, steps = angle_dtype(model.dtype), model.rotary_steps
        at_sinks = self.ages.clamp(max=layout.num_slots - 1)
        self.at_ring = [part[:, None] for part in rotary_angles(self.ages + cache.start_pos, steps, dtype)]
        self.at_sinks = [part[:, None] for part in rotary_angles(at_sinks, steps, dtype)]
        is_sink = (self.ages < layout.sinks)[:, None, :, None]
        both = zip(self.at_sinks, self.at_ring, strict=True)
        self.at_own = [torch.where(is_sink, sink, ring) for sink, ring in both]
        self.rows = torch.arange(cache.batch_size, device=model.device)[:, None]
        self.write_slots = cache.slots(self.ages)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = apply_rotary(k, *self.at_own)
        keys = torch.cat((self.cache.keys[layer, :, :, : self.num_slots], key), dim=2)
        values = torch.cat((self.cache.values[layer, :, :, : self.num_slots], v), dim=2)
        self.cache.keys[layer][self.rows, :, self.write_slots] = key.transpose(1, 2)
        self.cache.values[layer][self.rows, :, self.write_slots] = v.transpose(1, 2)

        query = apply_rotary(q, *self.at_ring)
        if self.is_sink is not None:
            at_sinks = apply_rotary(q, *self.at_sinks)[..., : self.rotary_ndims]
            query, keys = torch.cat((query, at_sinks), dim=-1), self._places(keys, self.is_sink)
        return attend(query, keys, values, self.mask, self.scale)

    def _places(self, keys: Tensor, is_sink: Tensor) -> Tensor:
        rotated, passed = keys[..., : self.rotary_ndims], keys[..., self.rotary_ndims :]
        return torch.cat((rotated.masked_fill(is_sink, 0), passed, rotated.masked_fill(~is_sink, 0)), dim=-1)


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
