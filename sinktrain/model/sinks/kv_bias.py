"""A learned key and value per head that no token owns.

Source: "KV biases" of Gu et al. (arXiv 2410.10781) section 5, Table 4; Sun et al. (arXiv 2402.17762)
section 4.1 call them explicit attention biases.
"""

from __future__ import annotations

import torch
from torch import nn

from sinktrain.model.sinks.base import AttentionSink, NullSlot, register


@register
class KeyValueBias(AttentionSink):
    """The value starts at zero, where it is the kind ``k_bias``."""

    name = "kv_bias"
    about = "a learned key and value per head"
    loads_as = "prefix"

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.num_heads = num_heads
        self.key = nn.Parameter(torch.empty(hidden_size))
        self.value = nn.Parameter(torch.empty(hidden_size))

    def initialize(self, generator: torch.Generator, std: float) -> None:
        self.key.normal_(0.0, std, generator=generator)
        nn.init.zeros_(self.value)

    def null_slot(self) -> NullSlot:
        key, value = (bias.view(self.num_heads, -1) for bias in (self.key, self.value))
        return NullSlot(key, value=value)
