"""A learned key per head that no token owns, with nothing to add for it.

Source: "K biases" of Gu et al. (arXiv 2410.10781) section 5, Table 4.
"""

from __future__ import annotations

import torch
from torch import nn

from sinktrain.model.sinks.base import AttentionSink, NullSlot, register


@register
class KeyBias(AttentionSink):
    name = "k_bias"
    about = "a learned key per head whose value is zero"
    loads_as = "prefix"

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.num_heads = num_heads
        self.key = nn.Parameter(torch.empty(hidden_size))

    def initialize(self, generator: torch.Generator, std: float) -> None:
        self.key.normal_(0.0, std, generator=generator)

    def null_slot(self) -> NullSlot:
        return NullSlot(self.key.view(self.num_heads, -1))
