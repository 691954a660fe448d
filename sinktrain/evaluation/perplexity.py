"""Losses of a model on parallel streams of one text, under each policy and layout, token by token.

Every row of a table scores the same text tokens: those from index N on, N the most slots of any
layout in it. Streams start with the model's own sinks under every layout; 0+N evicts them in time.

Axes: stream, token (of the text, sinks not counted).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sinktrain.errors import DataError
from sinktrain.evaluation.pieces import with_sinks
from sinktrain.evaluation.recompute import recompute_losses
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import Layout

Policy = Literal["streaming", "dense", "recompute"]
POLICIES: tuple[Policy, ...] = ("streaming", "dense", "recompute")
RECOMPUTE_TOKENS = 4096


@dataclass(frozen=True)
class Setting:
    """How a model reads a stream: a row of a table."""

    policy: Policy
    layout: Layout


@dataclass(frozen=True)
class Measured:
    """Losses under one setting.

    Args:
        losses: float64[stream, token], nats; NaN for the first token, which nothing predicts in every arm.
        first_scored: index of the first token that the table counts.
        first_pos: stream position of token 0: the number of sinks in front.
    """

    setting: Setting
    losses: NDArray[np.float64]
    first_scored: int
    first_pos: int

    @property
    def scored(self) -> NDArray[np.float64]:
        """The losses that the table counts, NaN elsewhere: float64[stream, token]."""
        is_scored = np.arange(self.losses.shape[1]) >= self.first_scored
        return np.where(is_scored, self.losses, np.nan)


def cut_streams(tokens: NDArray[np.int64], num_streams: int, first_scored: int) -> NDArray[np.int64]:
    """Cut a text into equally long streams, fewer where they would be shorter than four windows.

    Returns:
        int64[stream, token].

    Raises:
        DataError: not one stream is longer than the tokens that are not scored.
    """
    if len(tokens) < first_scored + 2:
        raise DataError(
            f"there are {len(tokens)} tokens of text and scoring starts after {first_scored}; "
            "use a longer text, a larger --max-tokens or smaller --layouts"
        )
    fitting = max(1, min(num_streams, len(tokens) // (4 * first_scored)))
    length = len(tokens) // fitting
    return tokens[: fitting * length].reshape(fitting, length)


def settings_for(
    policies: Sequence[str], layouts: list[Layout], stream_len: int, num_sinks: int = 0
) -> list[Setting]:
    """The rows of a model's table.

    ``dense`` is a stream whose window holds all its tokens, sinks included. ``recompute`` reads the last
    tokens anew for each token, behind the model's own sinks: one row for each N of the layouts.
    """
    settings = [Setting("streaming", layout) for layout in layouts] if "streaming" in policies else []
    if "dense" in policies:
        settings.append(Setting("dense", Layout(0, stream_len)))
    if "recompute" in policies:
        sizes = dict.fromkeys(layout.num_slots for layout in layouts)
        settings += [Setting("recompute", Layout(num_sinks, size - num_sinks)) for size in sizes]
    return settings


def measure(
    model: GPTNeoX,
    streams: NDArray[np.int64],
    settings: Iterable[Setting],
    first_scored: int,
    recompute_tokens: int = RECOMPUTE_TOKENS,
) -> Iterator[Measured]:
    """Score the streams under each setting.

    Args:
        streams: int64[stream, token], without sinks.
        first_scored: index of the first text token that counts.
        recompute_tokens: of all streams, that ``recompute`` scores: each costs a window.
    """
    for setting in settings:
        if setting.policy == "recompute":
            size = setting.layout.num_slots
            losses = recompute_losses(model, streams, size, first_scored, recompute_tokens)
        else:
            losses = _stream_losses(model, streams, setting.layout)
        yield Measured(setting, losses, first_scored, len(model.sink_ids))


def _stream_losses(model: GPTNeoX, streams: NDArray[np.int64], layout: Layout) -> NDArray[np.float64]:
    num_sinks = len(model.sink_ids)
    losses = stream_loss(model, with_sinks(model, streams), layout.sinks, layout.window)
    of_text = np.full(streams.shape, np.nan)
    of_text[:, 1:] = losses[:, num_sinks:].double().cpu().numpy()
    return of_text


def dense_bytes(model: GPTNeoX, num_streams: int, stream_len: int) -> int:
    """Memory of a cache that keeps every token of the streams."""
    network = model.config.network
    num_tokens = num_streams * stream_len
    return 2 * network.num_hidden_layers * num_tokens * network.hidden_size * model.dtype.itemsize
