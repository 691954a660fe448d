"""Each head's output is multiplied by a sigmoid of the layer's normalised input.

Source: the head-wise gate of "Gated Attention for Large Language Models" (arXiv 2505.06708), as
qiuzh20/gated_attention has it in ``modeling_qwen3.py`` (``headwise_attn_output_gate``).
"""

from __future__ import annotations

import torch
from torch import nn

from sinktrain.model.sinks.base import AttentionSink, register


@register
class OutputGate(AttentionSink):
    """Starts near one half."""

    name = "gate"
    about = "a sigmoid gate on each head's output, from the layer's normalised input"
    loads_as = "code"

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.gate = nn.Linear(hidden_size, num_heads, bias=False)

    def initialize(self, generator: torch.Generator, std: float) -> None:
        self.gate.weight.normal_(0.0, std, generator=generator)

    def output_gate(self) -> nn.Linear:
        return self.gate
