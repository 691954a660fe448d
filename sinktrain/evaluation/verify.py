"""Blockwise evaluation against stepping the decoder: how far apart their logits are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sinktrain.evaluation.pieces import with_sinks
from sinktrain.model.devices import dtype_name
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.blockwise import stream_logits
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

MAX_BATCH = 8


def verify(
    model: GPTNeoX, streams: NDArray[np.int64], layouts: list[Layout], num_tokens: int
) -> list[dict[str, Any]]:
    """Step the decoder over the first tokens of the streams under each layout.

    Args:
        streams: int64[stream, token], without sinks; the first eight at most are taken.
        num_tokens: over all of these streams.

    Returns:
        ``verified[]`` of ``results.json`` without ``model`` and ``text``.
    """
    tokens = with_sinks(model, streams[:MAX_BATCH])
    tokens = tokens[:, : -(-num_tokens // len(tokens))].to(model.device)
    with progress_bar(total=len(layouts) * tokens.numel(), desc="verify", unit="tok") as bar:
        return [
            {
                "sinks": layout.sinks,
                "window": layout.window,
                "num_tokens": tokens.numel(),
                "max_logit_diff": _largest_difference(model, tokens, layout, bar.update),
                "dtype": dtype_name(model.dtype),
            }
            for layout in layouts
        ]


@torch.no_grad()
def _largest_difference(model: GPTNeoX, tokens: torch.Tensor, layout: Layout, on_step: Any) -> float:
    decoder = StreamingDecoder(model, layout.sinks, layout.window, batch_size=len(tokens))
    worst, done = torch.zeros((), device=model.device, dtype=torch.float64), 0
    for block in stream_logits(model, tokens, layout.sinks, layout.window):
        for blockwise in block.unbind(dim=1):
            stepped = decoder.step(tokens[:, done])
            worst = torch.maximum(worst, (stepped.double() - blockwise.double()).abs().max())
            done += 1
            on_step(len(tokens))
    return float(worst)
