"""Attention of streams that march in step, whole blocks at a time: exact evaluation in plain torch.

All rows have the same age. So positions are known without asking the device, and the keys that a query
sees lie side by side: a band of the newest ``window`` tokens, and what is in front of it, a null slot and
the sinks. A query is rotated twice, as ``sinktrain.model.places`` explains. A block of queries is
folded into pieces about as long as the window, so that the cost of a token does not depend on the size of
its block.

Axes: batch, head, fold, seq (queries of a fold), key, head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sinktrain.model.attention import Attend
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.places import Places
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.model.sinks.base import NullSlot
from sinktrain.streaming.blocks import MAX_SCORES, attend
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.step import has_kernels

BLOCK_TOKENS = 4096
"""Tokens of all rows that are fed at once: enough to keep two cores in large matrix products."""
MIN_FOLD = 32


class Band(Attend, Protocol):
    """Attention of one block after the other; remembers what later blocks will see."""

    block_size: int
    """Tokens of each row that are fed at once."""

    def begin(self, num_tokens: int) -> None:
        """Say that the next block has so many tokens of each row."""


def march(model: GPTNeoX, tokens: Tensor, layout: Layout, block_size: int | None) -> Iterator[Tensor]:
    """Feed streams from their start on, int64[batch, seq].

    Yields:
        States before the head, float[batch, block, hidden]; their concatenation covers ``tokens``.
    """
    band = make_band(model, layout, len(tokens), tokens.shape[1], block_size)
    for block in torch.split(tokens, band.block_size, dim=1):
        band.begin(block.shape[1])
        yield model.hidden(block, band)


def make_band(
    model: GPTNeoX, layout: Layout, batch_size: int, stream_len: int, block_size: int | None
) -> Band:
    """The band by Triton's kernels where ``has_kernels``, otherwise in plain torch."""
    if has_kernels(model):
        from sinktrain.streaming.band_fused import FusedBand

        return FusedBand(model, layout, batch_size, stream_len, block_size)
    return PlainBand(model, layout, batch_size, block_size)


class PlainBand:
    """The band by ``scaled_dot_product_attention``, in any dtype and on any device."""

    def __init__(
        self, model: GPTNeoX, layout: Layout, batch_size: int, block_size: int | None = None
    ) -> None:
        network = model.config.network
        self.model, self.layout = model, layout
        self.num_heads, self.scale = network.num_attention_heads, network.head_dim**-0.5
        self.places = Places(model, layout.sinks)
        self.age, self.num_tokens = 0, 0
        self.block_size = block_size or self._block_size(batch_size)
        sizes = (network.num_hidden_layers, batch_size, self.num_heads)
        # Shorter windows than a block are folded, and a fold's keys need their place from the start on.
        self.is_folded = layout.window <= self.block_size
        held = (layout.window - 1) * self.is_folded
        self.held_keys = [model.embed_out.weight.new_zeros(*sizes[1:], held, network.head_dim)] * sizes[0]
        self.held_values = list(self.held_keys)
        # A null slot's, and the sinks' as they come; values as wide as keys, as ``attend`` wants them.
        num_first, width = self.places.num_nulls + layout.sinks, self.places.width
        self.first_keys = model.embed_out.weight.new_zeros(*sizes, num_first, width)
        self.first_values = torch.zeros_like(self.first_keys)
        self._steady_mask: tuple[tuple[int, int], Tensor] | None = None

    def begin(self, num_tokens: int) -> None:
        self.age, self.num_tokens = self.age + self.num_tokens, num_tokens
        layout, steps, dtype = self.layout, self.model.rotary_steps, angle_dtype(self.model.dtype)
        ages = torch.arange(self.age, self.age + num_tokens, device=self.model.device)
        self.at_ring = rotary_angles(ages, steps, dtype)
        self.at_sinks = rotary_angles(ages.clamp(max=layout.num_slots - 1), steps, dtype)
        self.fold = min(num_tokens, max(layout.window, MIN_FOLD)) if self.is_folded else num_tokens
        self.num_folds = -(-num_tokens // self.fold)
        self.mask = self._mask()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        key = apply_rotary(k, *self.at_ring)
        keys = torch.cat((self.held_keys[layer], key), dim=2)
        values = torch.cat((self.held_values[layer], v), dim=2)
        num_held = min(self.layout.window - 1, keys.shape[2])
        self.held_keys[layer] = keys[:, :, keys.shape[2] - num_held :]
        self.held_values[layer] = values[:, :, values.shape[2] - num_held :]

        if null is not None and self.age == 0:
            self._keep_null(layer, null, v)
        self._keep_sinks(layer, key, v)
        query = self._folded_queries(self.places.queries(q, self.at_ring, self.at_sinks))
        keys = self._folded_keys(keys, self.first_keys[layer])
        values = self._folded_keys(values, self.first_values[layer])
        mixed = attend(query, keys, values, self.mask, self.scale)[..., : v.shape[-1]]
        mixed = mixed.reshape(len(q), self.num_heads, -1, v.shape[-1])
        return mixed[:, :, : self.num_tokens]

    def _keep_null(self, layer: int, null: NullSlot, v: Tensor) -> None:
        key, value = self.places.null(null, like=v)
        self.first_keys[layer, :, :, :1] = key
        self.first_values[layer, :, :, :1, : v.shape[-1]] = value

    def _keep_sinks(self, layer: int, key: Tensor, v: Tensor) -> None:
        first, last = self.age, min(self.layout.sinks, self.age + self.num_tokens)
        if last > first:
            new = slice(self.places.num_nulls + first, self.places.num_nulls + last)
            is_sink = torch.ones((), dtype=torch.bool, device=key.device)
            self.first_keys[layer, :, :, new] = self.places.keys(key[:, :, : last - first], is_sink)
            self.first_values[layer, :, :, new, : v.shape[-1]] = v[:, :, : last - first]

    def _folded_queries(self, query: Tensor) -> Tensor:
        """[batch, head, seq, head_dim] -> [batch, head x fold, seq, head_dim], the last fold filled up."""
        query = _filled_up(query, self.num_folds * self.fold)
        batch, _, _, width = query.shape
        return query.reshape(batch, -1, self.fold, width)

    def _folded_keys(self, band: Tensor, first: Tensor) -> Tensor:
        """What every query sees, and each fold's share of the band: [batch, head x fold, key, width]."""
        num_first, full_width = first.shape[2:]
        if not num_first and self.num_folds == 1:
            return band
        seq = band.shape[2] - self.num_tokens + self.num_folds * self.fold
        band = _filled_up(band, seq).contiguous()
        per_fold = seq - (self.num_folds - 1) * self.fold
        batch, heads, _, width = band.shape
        strides = (*band.stride()[:2], self.fold * width, width, 1)
        folds = band.as_strided((batch, heads, self.num_folds, per_fold, width), strides)
        shape = (batch, heads, self.num_folds, num_first + per_fold, full_width)
        together = band.new_zeros(shape) if full_width > width else band.new_empty(shape)
        together[:, :, :, :num_first] = first[:, :, None]
        together[:, :, :, num_first:, :width] = folds
        return together.flatten(1, 2)

    def _mask(self) -> Tensor:
        """What each query sees, as an addend: float[1, head x fold or 1, seq, first and key]."""
        sinks, window = self.layout.sinks, self.layout.window
        first_key = self.age - self.held_keys[0].shape[2]
        num_keys = self.age + self.fold - first_key
        is_steady = first_key >= sinks and self.is_folded
        if is_steady and self._steady_mask is not None and self._steady_mask[0] == (self.fold, num_keys):
            return self._steady_mask[1]
        device = self.model.device
        starts = self.fold * torch.arange(1 if is_steady else self.num_folds, device=device)[:, None]
        query = (self.age + starts + torch.arange(self.fold, device=device))[:, :, None]
        key = (first_key + starts + torch.arange(num_keys, device=device))[:, None]
        in_band = (key <= query) & (key > query - window) & (key >= sinks)
        in_first = torch.arange(-self.places.num_nulls, sinks, device=device) <= query
        visible = torch.cat((in_first, in_band), dim=-1)
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=device)
        mask = mask.masked_fill_(~visible, -torch.inf)[None]
        if is_steady:
            self._steady_mask = (self.fold, num_keys), mask
        return mask if mask.shape[1] == 1 else mask.repeat(1, self.num_heads, 1, 1)

    def _block_size(self, batch_size: int) -> int:
        """Tokens of a row fed at once: whole folds, as many as the memory for their scores allows."""
        window = self.layout.window
        per_query = batch_size * self.num_heads * (self.layout.num_slots + min(window, BLOCK_TOKENS))
        tokens = max(1, min(BLOCK_TOKENS // batch_size, MAX_SCORES // per_query))
        fold = max(window, MIN_FOLD)
        return tokens // fold * fold or tokens


def _filled_up(x: Tensor, seq: int) -> Tensor:
    """Zeros behind the tokens of [batch, head, seq, head_dim] until there are ``seq``."""
    return torch.nn.functional.pad(x, (0, 0, 0, seq - x.shape[2])) if seq > x.shape[2] else x
