"""Learnable placeholder tokens in front of every sample: StreamingLLM (arXiv 2309.17453) section 3.3."""

from __future__ import annotations

from sinktrain.model.sinks.base import AttentionSink, register


@register
class SinkToken(AttentionSink):
    """The data puts the tokens there; attention stays as it is."""

    name = "token"
    about = "learnable placeholder tokens in front of every sample"
    has_tokens = True
