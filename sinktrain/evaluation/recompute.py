"""The paper's strong baseline: for each token, the last tokens read anew behind the model's own sinks.

Another function than streaming: here the oldest token of a window sees only itself and the sinks, there its
states remember what the window has left behind.

Axes: stream, token (of the text, sinks not counted), window (one for each scored token), seq, vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from sinktrain.errors import StreamError
from sinktrain.evaluation.statistics import NUM_BLOCKS
from sinktrain.model.attention import CausalAttention
from sinktrain.model.loss import token_losses
from sinktrain.model.neox import GPTNeoX

MIN_RUN_TOKENS = 256
MAX_ACTIVATIONS = 2**27
"""Outputs of the widest layer held at once, unless a single window needs more."""
MAX_CPU_ACTIVATIONS = 2**23
"""The same on the CPU, whose caches like small batches."""


@torch.no_grad()
def recompute_losses(
    model: GPTNeoX,
    streams: NDArray[np.int64],
    num_slots: int,
    first_scored: int,
    max_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Loss of text tokens, each predicted by a dense window of its own at positions 0, 1, 2, …

    A window holds the model's sinks and the ``num_slots - sinks`` text tokens before the scored one, fewer
    at the start of a stream. Only its last state goes through the head.

    Args:
        streams: int64[stream, token], without sinks.
        num_slots: N, sinks included.
        first_scored: index of the first text token that counts; token 0, which nothing predicts, never does.
        max_tokens: that are scored, over all streams; see ``spread_runs``.
        on_progress: called after each batch with the number of tokens that it scored.

    Returns:
        float64[stream, token], nats; NaN where not scored.

    Raises:
        StreamError: the sinks leave no room for a text token.
    """
    num_sinks = len(model.sink_ids)
    if num_slots <= num_sinks:
        raise StreamError(
            f"recompute over {num_slots} slots has no room for a text token besides the model's {num_sinks} "
            f"sinks; use {num_sinks + 1} or more"
        )
    context = min(num_slots - num_sinks, streams.shape[1])
    attend = CausalAttention(model.rotary_steps, num_sinks + context, model.dtype)
    sinks = torch.tensor(model.sink_ids, dtype=torch.int64, device=model.device)
    tokens = torch.from_numpy(streams).to(model.device)
    losses = torch.full(streams.shape, torch.nan, dtype=torch.float64, device=model.device)
    scored = torch.from_numpy(spread_runs(streams.shape, max(1, first_scored), max_tokens)).to(model.device)

    for batch in torch.split(scored, _batch_size(model, num_sinks + context)):
        stream, token = batch.unbind(dim=1)
        start = (token - context).clamp(min=0)
        text = tokens[stream[:, None], start[:, None] + torch.arange(context, device=model.device)]
        windows = torch.cat((sinks.expand(len(batch), -1), text), dim=1)
        last = num_sinks + token - start - 1  # what follows it in a window at the start isn't seen
        hidden = model.hidden(windows, attend)[torch.arange(len(batch), device=model.device), last]
        losses[stream, token] = token_losses(model.logits(hidden), tokens[stream, token]).double()
        if on_progress is not None:
            on_progress(len(batch))
    return losses.cpu().numpy()


def spread_runs(shape: tuple[int, int], first_scored: int, max_tokens: int) -> NDArray[np.int64]:
    """Tokens to score: runs of neighbours, spread evenly over the text; a run may go on in the next stream.

    The statistics cut what is scored into ``NUM_BLOCKS`` blocks; each holds whole runs, of which there are as
    many as stay ``MIN_RUN_TOKENS`` long. (Single tokens would tell more, but bytes are counted over text.)

    Args:
        shape: number of streams, tokens of each.
        first_scored: index of the first token of a stream that may be scored.
        max_tokens: all that may be, if they are no more than this.

    Returns:
        int64[scored, 2], stream and token of each, in the order of the text.
    """
    num_streams, stream_len = shape
    per_stream = max(0, stream_len - first_scored)
    num_scored = min(max_tokens, num_streams * per_stream)
    num_runs = NUM_BLOCKS * max(1, num_scored // (NUM_BLOCKS * MIN_RUN_TOKENS))
    scored = np.arange(num_scored)
    run = scored * num_runs // max(1, num_scored)
    left_out = (num_streams * per_stream - num_scored) * (run + 1) // (num_runs + 1)  # before each
    stream, token = np.divmod(scored + left_out, max(1, per_stream))
    return np.stack((stream, token + first_scored), axis=1)


def _batch_size(model: GPTNeoX, window_len: int) -> int:
    network = model.config.network
    widest = max(network.intermediate_size or 0, 3 * network.hidden_size)
    most = MAX_CPU_ACTIVATIONS if model.device.type == "cpu" else MAX_ACTIVATIONS
    return max(1, most // max(window_len * widest, model.config.vocab_size))
