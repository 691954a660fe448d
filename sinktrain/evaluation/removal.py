"""What a model loses with its first tokens: taken away, or exchanged for line breaks.

Both tests score the same text tokens twice, as the model is used and changed, and pair them.

- *Removed* (Barbero et al., arXiv 2504.02732, Table 2): dense, within the trained length, without the
  model's own sinks; without the first text token where it has none. A loss that rises says that the model
  depends on what it was always trained with in front. One that stays says that it does not: a vanilla
  model makes a sink of whatever comes first.
- *Replaced* (StreamingLLM, arXiv 2309.17453, Table 1): streaming, with the kept first tokens exchanged for
  line breaks. A loss that stays says that position makes the sink: any token kept there serves. A loss
  that rises, as far as it does without kept tokens, says that meaning makes it: this token, learned.

Axes: stream, token (of the text, sinks not counted).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinktrain.errors import DataError
from sinktrain.evaluation.pieces import cut_pieces, spread, with_sinks
from sinktrain.evaluation.statistics import paired_difference
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import VANILLA_SINKS, Layout

Row = dict[str, Any]

MAX_TOKENS = 2**15
"""Tokens that each reading of each test is about; the streams may hold more."""

FIRST_SCORED = 8
"""Of a window's text tokens in the removed test: before it, a missing token is also missing context."""

TOKENS_AT_ONCE = 2**13


def removal_rows(
    model: GPTNeoX,
    streams: NDArray[np.int64],
    layouts: list[Layout],
    newline_ids: list[int],
    max_tokens: int = MAX_TOKENS,
) -> list[Row]:
    """Rows of ``removal[]`` in ``results.json``, without model and text.

    Args:
        streams: int64[stream, token], plain text, as the perplexity table reads it.
        layouts: the table's; replaced are those that keep as many first tokens as the model has sinks (or
            one, if it has none) and those that keep four. Targets follow the largest of all, as in the table.
        newline_ids: what the tokenizer makes of a line break, of which the first is used; without any
            there are no replaced rows.
        max_tokens: of the streams, that each reading is about; spread evenly over them.

    Returns:
        The removed row, then the replaced ones; left out where fewer than 16 tokens can be scored.
    """
    rows = _removed(model, streams, max_tokens)
    if not newline_ids or not layouts:
        return rows
    first_scored = max(layout.num_slots for layout in layouts)
    chosen = _some_of(streams, first_scored, max_tokens)
    needed = max(1, len(model.sink_ids))
    for layout in dict.fromkeys(layouts):
        if layout.sinks in (needed, VANILLA_SINKS):
            rows += _replaced(model, chosen, layout, first_scored, newline_ids[0])
    return rows


def _removed(model: GPTNeoX, streams: NDArray[np.int64], max_tokens: int) -> list[Row]:
    length = min(model.config.network.max_position_embeddings, streams.shape[1])
    num_sinks = len(model.sink_ids)
    windows = cut_pieces(streams, length, max(1, max_tokens // length))[:, : length - num_sinks]
    num_scored = windows.shape[1] - FIRST_SCORED
    if num_scored < 1:
        return []
    num_removed = max(1, num_sinks)
    tokens = with_sinks(model, windows)
    layout = Layout(0, length)  # a window that never slides
    as_it_is = _last_losses(model, tokens, layout, num_scored)
    changed = _last_losses(model, tokens[:, num_removed:], layout, num_scored)
    return _rows("removed", "dense", layout, num_removed, as_it_is, changed)


def _replaced(
    model: GPTNeoX, streams: NDArray[np.int64], layout: Layout, first_scored: int, newline_id: int
) -> list[Row]:
    num_scored = streams.shape[1] - first_scored
    if num_scored < 1:
        return []
    tokens = with_sinks(model, streams)
    with_newlines = tokens.clone()
    with_newlines[:, : layout.sinks] = newline_id
    as_it_is = _last_losses(model, tokens, layout, num_scored)
    changed = _last_losses(model, with_newlines, layout, num_scored)
    return _rows("replaced", "streaming", layout, layout.sinks, as_it_is, changed)


def _some_of(streams: NDArray[np.int64], first_scored: int, max_tokens: int) -> NDArray[np.int64]:
    """Starts of some streams, about ``max_tokens`` together; half of them or more follow ``first_scored``."""
    shortest = 2 * first_scored
    num_streams = min(len(streams), max(1, max_tokens // shortest))
    length = max(max_tokens // num_streams, shortest)
    return streams[spread(len(streams), num_streams), :length]


def _last_losses(model: GPTNeoX, tokens: Tensor, layout: Layout, num_scored: int) -> NDArray[np.float64]:
    """Losses of each stream's last tokens in nats: int64[stream, seq] -> float64[stream, num_scored]."""
    losses = [
        stream_loss(model, batch, layout.sinks, layout.window, require_sink=False)[:, -num_scored:]
        for batch in torch.split(tokens, max(1, TOKENS_AT_ONCE // tokens.shape[1]))
    ]
    return torch.cat(losses).double().cpu().numpy()


def _rows(
    test: str,
    policy: str,
    layout: Layout,
    num_tokens: int,
    as_it_is: NDArray[np.float64],
    changed: NDArray[np.float64],
) -> list[Row]:
    """One row, or none where too few tokens are scored for an interval."""
    try:
        difference = paired_difference(changed, as_it_is)
    except DataError:
        return []
    is_scored = ~np.isnan(changed - as_it_is)
    return [
        {
            "test": test,
            "policy": policy,
            "sinks": layout.sinks,
            "window": layout.window,
            "num_tokens": num_tokens,
            "tokens_scored": int(is_scored.sum()),
            "loss_nats": float(as_it_is[is_scored].mean()),
            "changed_loss_nats": float(changed[is_scored].mean()),
            "delta_nats": difference.delta_nats,
            "ci95": [difference.low, difference.high],
            "p": difference.p,
            "interval": "text",
        }
    ]
