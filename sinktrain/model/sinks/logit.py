"""One learned logit per head joins the denominator of the softmax, as in gpt-oss.

Source: ``sinks`` of ``GptOssAttention`` in transformers, v5.17 ``models/gpt_oss/modeling_gpt_oss.py``.
"""

from __future__ import annotations

import torch
from torch import nn

from sinktrain.model.sinks.base import AttentionSink, NullSlot, register


@register
class SinkLogit(AttentionSink):
    """Starts at 0, where it is the kind ``zero``."""

    name = "logit"
    about = "one learned logit per head in the softmax's denominator"
    loads_as = "code"

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.score = nn.Parameter(torch.empty(num_heads))

    def initialize(self, generator: torch.Generator, std: float) -> None:
        nn.init.zeros_(self.score)

    def null_slot(self) -> NullSlot:
        return NullSlot(score=self.score)
