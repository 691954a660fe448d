"""Softmax with one more score, which is 0, and nothing to add for it (softmax-off-by-one).

Source: Zero Sink in StreamingLLM (arXiv 2309.17453) section 3.3; "Attention Is Off By One" (Miller, 2023).
"""

from __future__ import annotations

from sinktrain.model.sinks.base import AttentionSink, NullSlot, register


@register
class ZeroSink(AttentionSink):
    name = "zero"
    about = "softmax with one more score, which is 0 and has no value"
    loads_as = "prefix"

    def null_slot(self) -> NullSlot:
        return NullSlot()
