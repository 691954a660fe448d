"""Rows of ``results.json`` from measured models: losses, their differences, how sure both are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sinktrain.evaluation.arms import Arm, Streams
from sinktrain.evaluation.perplexity import Measured, Setting
from sinktrain.evaluation.statistics import by_position, mean_interval, paired_difference

Row = dict[str, Any]


def perplexity_rows(arm: Arm) -> Iterator[Row]:
    for text, measured in zip(arm.texts, arm.measured, strict=True):
        sizes: dict[bytes, tuple[int, int]] = {}  # most rows score the same tokens
        for one in measured:
            is_scored = ~np.isnan(one.scored)
            key = np.packbits(is_scored).tobytes()
            if key not in sizes:
                num_bytes = text.text.num_bytes(text.tokens[is_scored])
                sizes[key] = num_bytes, text.text.num_documents(text.tokens, is_scored)
            num_bytes, num_documents = sizes[key]
            interval = mean_interval(one.scored)
            tokens_scored = int(is_scored.sum())
            nats = interval.mean * tokens_scored
            yield {
                **_row(arm, text, one.setting),
                "tokens_scored": tokens_scored,
                "documents_scored": num_documents,
                "loss_nats": interval.mean,
                "perplexity": math.exp(interval.mean),
                "bits_per_byte": nats / num_bytes / math.log(2) if num_bytes else None,
                "ci95": [interval.low, interval.high],
            }


def position_rows(arm: Arm) -> Iterator[Row]:
    for text, measured in zip(arm.texts, arm.measured, strict=True):
        for one in measured:
            stream_pos = np.arange(one.losses.shape[1]) + one.first_pos
            positions, losses = by_position(one.losses, stream_pos)
            yield {
                **_row(arm, text, one.setting),
                "stream_pos": positions.tolist(),
                "loss_nats": losses.tolist(),
            }


def between_models(arms: list[Arm]) -> Iterator[Row]:
    """Later models against earlier ones, where they share a vocabulary: under the same setting, and each in
    its usual layout of the same N where that is not the same."""
    for first, second in itertools.combinations(arms, 2):
        if first.tokenizer != second.tokenizer:
            continue
        for text, ones, others in zip(first.texts, first.measured, second.measured, strict=True):
            for one, other in itertools.product(ones, others):
                if _is_same_row(one.setting, other.setting):
                    yield _paired(text, second, other, first, one)
            usual, others_usual = _usual(first, ones), _usual(second, others)
            for size, one in usual.items():
                if size in others_usual and first.usual_sinks != second.usual_sinks:
                    other = others_usual[size]
                    yield _paired(text, second, other, first, one) | _layouts(other, one)


def between_layouts(arm: Arm) -> Iterator[Row]:
    """A model's other layouts against the one of the same N that keeps as many slots as it needs."""
    for text, measured in zip(arm.texts, arm.measured, strict=True):
        for one, reference in _with_reference(arm, measured, "streaming"):
            if one is not reference:
                yield _paired(text, arm, one, arm, reference) | _layouts(one, reference)


def between_policies(arm: Arm) -> Iterator[Row]:
    """A model's recomputed rows against streaming at the same N, where it keeps as many slots as it needs."""
    for text, measured in zip(arm.texts, arm.measured, strict=True):
        for one, reference in _with_reference(arm, measured, "recompute"):
            policies = {"a_policy": one.setting.policy, "b_policy": reference.setting.policy}
            yield _paired(text, arm, one, arm, reference) | _layouts(one, reference) | policies


def _usual(arm: Arm, measured: list[Measured]) -> dict[int, Measured]:
    """The rows of the layouts that a model is streamed in, by N."""
    return {
        one.setting.layout.num_slots: one
        for one in measured
        if one.setting.policy == "streaming" and one.setting.layout.sinks == arm.usual_sinks
    }


def _with_reference(arm: Arm, measured: list[Measured], policy: str) -> Iterator[tuple[Measured, Measured]]:
    streaming = [one for one in measured if one.setting.policy == "streaming"]
    references = {
        one.setting.layout.num_slots: one for one in streaming if one.setting.layout.sinks == arm.needed_sinks
    }
    for one in measured:
        reference = references.get(one.setting.layout.num_slots)
        if one.setting.policy == policy and reference is not None:
            yield one, reference


def _paired(text: Streams, a: Arm, a_measured: Measured, b: Arm, b_measured: Measured) -> Row:
    difference = paired_difference(a_measured.scored, b_measured.scored)
    setting = a_measured.setting
    return {
        "a": a.name,
        "b": b.name,
        "text": text.name,
        "policy": setting.policy,
        "sinks": setting.layout.sinks,
        "window": setting.layout.window,
        "delta_nats": difference.delta_nats,
        "ci95": [difference.low, difference.high],
        "p": difference.p,
        "interval": "text",
    }


def _layouts(a: Measured, b: Measured) -> Row:
    return {
        "a_sinks": a.setting.layout.sinks,
        "a_window": a.setting.layout.window,
        "b_sinks": b.setting.layout.sinks,
        "b_window": b.setting.layout.window,
    }


def _row(arm: Arm, text: Streams, setting: Setting) -> Row:
    return {
        "model": arm.name,
        "text": text.name,
        "policy": setting.policy,
        "sinks": setting.layout.sinks,
        "window": setting.layout.window,
    }


def _is_same_row(a: Setting, b: Setting) -> bool:
    """Dense rows belong together, though sinks make a stream that much longer; so do recomputed windows."""
    if a.policy != b.policy or a.policy == "dense":
        return a.policy == b.policy
    if a.policy == "recompute":
        return a.layout.num_slots == b.layout.num_slots
    return a.layout == b.layout
