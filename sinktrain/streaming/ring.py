"""The cache of a stream: sink slots that stay, and a ring of slots that the newest tokens reuse.

Each key is rotated once, when it is written: a ring key at its stream position, a sink key at its
slot. Nothing is rotated again or moved. Queries do the rest (``sinktrain.streaming.blocks``).

Axes: batch, head, slot, head_dim. ``age`` counts the tokens of a row since its stream began;
``stream_pos`` is ``start_pos + age``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.layout import Layout


class RingCache:
    """Keys, values and tokens of ``batch_size`` streams that may differ in age.

    ``keys`` and ``values`` are dtype[layer, batch, head, slot, head_dim], sink slots first. ``tokens``
    is int64[batch, slot]. ``age`` and ``start_pos`` live on the device, where a CUDA graph reads them;
    ``min_age`` and ``max_age`` bound the ages of all rows, known without asking the device.
    """

    def __init__(
        self, model: GPTNeoX, layout: Layout, batch_size: int, start_pos: int = 0, spare_slots: int = 0
    ) -> None:
        network, device = model.config.network, model.device
        self.layout = layout
        self.ring_size = layout.window + spare_slots
        self.num_slots = layout.sinks + self.ring_size
        self.age = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.start_pos = torch.tensor(start_pos, dtype=torch.int64, device=device)
        self.min_age = self.max_age = 0
        self.tokens = torch.full((batch_size, self.num_slots), -1, dtype=torch.int64, device=device)
        rows = (network.num_hidden_layers, batch_size, network.num_attention_heads)
        self.keys = torch.zeros(*rows, self.num_slots, network.head_dim, dtype=model.dtype, device=device)
        self.values = torch.zeros_like(self.keys)

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

    def slot(self, age: int) -> int:
        """``slots`` of one age, without asking the device."""
        sinks = self.layout.sinks
        return age if age < sinks else sinks + (age - sinks) % self.ring_size

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

    def visible(self, newest: Tensor, num_slots: int) -> Tensor:
        """Whether the token written as ``newest`` sees what each of the first slots holds.

        int64[batch] -> bool[batch, num_slots]: sinks and the newest ``window`` tokens.
        """
        return is_visible(self.held_ages(newest, num_slots), newest[:, None], self.layout)

    def recent_tokens(self) -> Tensor:
        """Tokens that each row's newest one saw, itself included, -1 in other slots: int64[batch, slot]."""
        return self.tokens.masked_fill(~self.visible(self.age - 1, self.num_slots), -1)

    def write_tokens(self, tokens: Tensor) -> None:
        """Note tokens that were fed to every row, int64[batch, seq], no more than a window; the rows age."""
        ages = self.age[:, None] + torch.arange(tokens.shape[1], device=self.age.device)
        self.tokens.scatter_(1, self.slots(ages), tokens)
        self.age += tokens.shape[1]

    def shift_bounds(self, num_tokens: int) -> None:
        """Say that every row has aged by so many tokens on the device; a negative number took them back."""
        self.min_age += num_tokens
        self.max_age += num_tokens

    def rewind(self, num_tokens: int) -> None:
        """Take back the last tokens of every row; what they overwrote must have been spare slots."""
        self.age -= num_tokens
        self.shift_bounds(-num_tokens)

    def reset(self, rows: Sequence[int]) -> None:
        """Begin new streams in some rows; what their slots held is never seen again."""
        self.age[list(rows)] = 0
        self.values[:, list(rows)] = 0  # a slot that is not seen weighs nothing, but nothing times NaN is NaN
        self.min_age = 0
        if len(rows) == self.batch_size:
            self.max_age = 0

    def select(self, rows: Sequence[int]) -> RingCache:
        """A copy of some rows."""
        part = copy.copy(self)
        index = torch.tensor(rows, device=self.age.device)
        part.age, part.tokens = self.age[index], self.tokens[index]
        part.keys, part.values = self.keys[:, index], self.values[:, index]
        return part

    def assign(self, rows: Sequence[int], part: RingCache) -> None:
        """Put rows taken by ``select`` back."""
        index = torch.tensor(rows, device=self.age.device)
        self.age[index], self.tokens[index] = part.age, part.tokens
        self.keys[:, index], self.values[:, index] = part.keys, part.values
        self.max_age = max(self.max_age, part.max_age)


def is_visible(key_age: Tensor, query_age: Tensor, layout: Layout) -> Tensor:
    """Sinks and the newest ``window`` tokens, none from the future, no empty slot: bool."""
    is_kept = (key_age < layout.sinks) | (key_age > query_age - layout.window)
    return (key_age >= 0) & (key_age <= query_age) & is_kept
