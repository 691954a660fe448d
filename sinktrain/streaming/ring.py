"""The cache of a stream: sink slots that stay, and a ring of slots that the newest tokens reuse.

Each key is rotated once, at its stream position, when it is written; nothing is rotated again or
moved. A query sees ring keys at their true distance, and sink keys at a distance that stops
growing once the cache is full: its *rotary_pos* is ``min(age, sinks + window - 1)`` there. Both
live in one softmax because a key's rotated dimensions are stored in one of two places,

    ring key   [rotated at stream_pos | passed through | 0]
    sink key   [0                     | passed through | rotated at its slot]
    query      [rotated at stream_pos | passed through | rotated at rotary_pos]

so that a plain dot product picks the right rotation of the query.

Axes: batch, head, slot, head_dim (keys: head_dim + rotary_ndims). ``age`` counts the tokens of a
row since its stream began; ``stream_pos`` is ``start_pos + age``.

Source: StreamingLLM (arXiv 2309.17453) section 3.2, whose code caches unrotated keys and rotates
all of them at every token; the two agree exactly (tests/oracles.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.streaming.layout import Layout


class RingCache:
    """Keys and values of ``batch_size`` streams that may differ in age."""

    def __init__(
        self, model: GPTNeoX, layout: Layout, batch_size: int, start_pos: int = 0, spare_slots: int = 0
    ) -> None:
        network = model.config.network
        self.layout = layout
        self.start_pos = start_pos
        self.ring_size = layout.window + spare_slots
        self.age = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self.min_age = self.max_age = 0  # bounds of all rows' ages, known without asking the device
        num_slots = layout.sinks + self.ring_size
        heads, key_dim = network.num_attention_heads, network.head_dim + network.rotary_ndims

        def empty(width: int) -> Tensor:
            shape = (network.num_hidden_layers, batch_size, heads, num_slots, width)
            return torch.zeros(shape, dtype=model.dtype, device=model.device)

        self.keys = empty(key_dim)
        self.values = empty(network.head_dim)

    @property
    def batch_size(self) -> int:
        return len(self.age)

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def slots(self, ages: Tensor) -> Tensor:
        """The slot that a token of this age is written to: int64 -> int64, same shape."""
        sinks = self.layout.sinks
        return torch.where(ages < sinks, ages, sinks + (ages - sinks) % self.ring_size)

    def held_ages(self, newest: Tensor, num_slots: int) -> Tensor:
        """Age of the token in each of the first slots, -1 where there is none: int64[batch, num_slots].

        Args:
            newest: int64[batch], age of the newest token written; -1 before the first.
            num_slots: slots to look at.
        """
        sinks, newest = self.layout.sinks, newest[:, None]
        slot = torch.arange(num_slots, device=newest.device)
        in_ring = newest - (newest - slot) % self.ring_size
        held = torch.where(slot < sinks, slot, in_ring)
        is_empty = (held > newest) | ((slot >= sinks) & (held < sinks))
        return held.masked_fill(is_empty, -1)

    def grow(self, num_tokens: int) -> None:
        """Count tokens that were fed to every row; a negative number takes them back."""
        self.age += num_tokens
        self.min_age += num_tokens
        self.max_age += num_tokens

    def reset(self, rows: Sequence[int]) -> None:
        """Begin new streams in some rows; what their slots held is never seen again."""
        self.age[list(rows)] = 0
        self.min_age = 0
        if len(rows) == self.batch_size:
            self.max_age = 0

    def select(self, rows: Sequence[int]) -> RingCache:
        """A copy of some rows."""
        part = copy.copy(self)
        index = torch.tensor(rows, device=self.age.device)
        part.age, part.keys, part.values = self.age[index], self.keys[:, index], self.values[:, index]
        return part

    def assign(self, rows: Sequence[int], part: RingCache) -> None:
        """Put rows taken by ``select`` back."""
        index = torch.tensor(rows, device=self.age.device)
        self.age[index], self.keys[:, index], self.values[:, index] = part.age, part.keys, part.values
        self.max_age = max(self.max_age, part.max_age)


class RingAttention:
    """Attention of a block of tokens that continue the streams of a cache; writes them into it.

    The block attends to the old ring plus itself before any slot is reused. Only where a slot's old
    token is out of every query's window already (a single token, or a block that fits the spare
    slots) is it written first, and the cache read in place.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, num_tokens: int) -> None:
        layout, network = cache.layout, model.config.network
        self.cache = cache
        self.ages = cache.age[:, None] + torch.arange(num_tokens, device=model.device)  # [batch, seq]
        self.rows = torch.arange(cache.batch_size, device=model.device)[:, None]
        self.writes_first = num_tokens <= cache.ring_size - layout.window + 1
        self.write_slots = cache.slots(self.ages)

        known = cache.max_age + (num_tokens if self.writes_first else 0)
        self.num_slots = min(known, layout.sinks + cache.ring_size)
        newest = self.ages[:, -1] if self.writes_first else cache.age - 1
        key_ages = cache.held_ages(newest, self.num_slots)
        if not self.writes_first:
            key_ages = torch.cat((key_ages, self.ages), dim=1)
        visible = _visible(key_ages[:, None], self.ages[:, :, None], layout)[:, None]
        # As an addend, because scaled_dot_product_attention would make one of a bool mask in every layer.
        self.mask = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
        self.mask.masked_fill_(~visible, -torch.inf)
        self.rotary_ndims, self.scale = network.rotary_ndims, network.head_dim**-0.5
        self.cos, self.sin = self._angles(model)

    def _angles(self, model: GPTNeoX) -> tuple[Tensor, Tensor]:
        """Of the two places (ring, sink) for query and key: [place, 2, batch, 1, seq, rotary_ndims].

        They are zero, which blanks the rotated dimensions, at the place where a key is not stored.
        """
        layout = self.cache.layout
        at_ring, at_sinks = self.ages + self.cache.start_pos, self.ages.clamp(max=layout.num_slots - 1)
        rotary_pos = torch.stack((at_ring, at_sinks))
        cos, sin = rotary_angles(rotary_pos, model.rotary_steps, angle_dtype(model.dtype))
        is_sink = self.ages < layout.sinks
        is_key_place = torch.stack((~is_sink, is_sink))
        share = torch.stack((torch.ones_like(is_key_place), is_key_place), dim=1)[:, :, :, None, :, None]
        return cos[:, None, :, None] * share, sin[:, None, :, None] * share

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = torch.stack((q, k))
        rotated, passed = both[..., : self.rotary_ndims], both[..., self.rotary_ndims :]
        ring, sink = apply_rotary(rotated.expand(2, *rotated.shape), self.cos, self.sin)
        query, key = torch.cat((ring, passed, sink), dim=-1)

        keys = self.cache.keys[layer, :, :, : self.num_slots]
        values = self.cache.values[layer, :, :, : self.num_slots]
        if self.writes_first:
            self._write(layer, key, v)
        else:
            keys = torch.cat((keys, key), dim=2)
            values = torch.cat((values, v), dim=2)
        out = _attend(query, keys, values, self.mask, self.scale)
        if not self.writes_first:
            self._write(layer, key, v)
        return out

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.cache.keys[layer][self.rows, :, self.write_slots] = key.transpose(1, 2)
        self.cache.values[layer][self.rows, :, self.write_slots] = value.transpose(1, 2)


def advance(model: GPTNeoX, tokens: Tensor, cache: RingCache) -> Iterator[Tensor]:
    """Feed tokens of any number to the streams, block by block, writing the cache.

    Args:
        tokens: int64[batch, seq], the same number for every row.

    Yields:
        States before the head, float[batch, block, hidden]; their concatenation covers ``tokens``.
    """
    for block in torch.split(tokens, block_size(model, cache), dim=1):
        yield _advance_block(model, block, cache)


def block_size(model: GPTNeoX, cache: RingCache) -> int:
    """Tokens fed at once: as many as the window where that is reasonable for the memory of the scores."""
    heads = model.config.network.num_attention_heads
    per_query = cache.batch_size * heads * (cache.layout.num_slots + 1)
    return max(1, min(cache.layout.window, 1024, MAX_SCORES // per_query))


MAX_SCORES = 2**27
"""Attention scores held at once, at most, unless a single token needs more."""


def _advance_block(model: GPTNeoX, block: Tensor, cache: RingCache) -> Tensor:
    hidden = model.hidden(block, RingAttention(model, cache, block.shape[1]))
    cache.grow(block.shape[1])
    return hidden


def _visible(key_age: Tensor, query_age: Tensor, layout: Layout) -> Tensor:
    """Sinks and the newest ``window`` tokens, none from the future, no empty slot: bool."""
    is_kept = (key_age < layout.sinks) | (key_age > query_age - layout.window)
    return (key_age >= 0) & (key_age <= query_age) & is_kept


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention; values are padded to the keys' width, which lets the fused CPU kernel take them."""
    head_dim, extra = values.shape[-1], keys.shape[-1] - values.shape[-1]
    padded = F.pad(values, (0, extra)) if extra else values
    return F.scaled_dot_product_attention(query, keys, padded, attn_mask=mask, scale=scale)[..., :head_dim]
