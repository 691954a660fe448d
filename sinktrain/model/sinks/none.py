"""Vanilla softmax attention."""

from __future__ import annotations

from sinktrain.model.sinks.base import AttentionSink, register


@register
class Vanilla(AttentionSink):
    name = "none"
    about = "vanilla softmax attention"
