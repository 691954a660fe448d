"""What ``bench evaluate`` measures in a cell: blocks against steps, their speed, their memory, their need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sinktrain.evaluation.timing import peak_bytes, reset_peak, times_ms
from sinktrain.experiments.contenders import Cell, step_contender
from sinktrain.model.loss import token_losses
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout
from sinktrain.training.throughput import flops_per_token

FEWEST_WINDOWS = 2
"""A stream has at least as many tokens as this many caches, so that evicting is timed too."""
STEPPED_TOKENS = {"cpu": 32, "cuda": 256}
WARM_UP_STEPS = {"cpu": 2, "cuda": 16}
CHECKED_STREAMS = 2
CHECKED_PAST_FULL = 16
"""Tokens after the cache is full that blocks and steps are compared over."""
MOST_CHECKED = {"cpu": 32, "cuda": 8192}
"""Steps that the comparison takes; what comes before them is prefilled."""


@dataclass(frozen=True)
class Scored:
    """Parallel streams scored once.

    Args:
        elapsed_s: for all their tokens.
        peak_mem_bytes: most held meanwhile, counted as ``sinktrain.evaluation.timing.peak_bytes`` does.
        quarter_peak_mem_bytes: the same for the first quarter of each stream; None where that is too
            short to hold as much as a longer one.
    """

    elapsed_s: float
    peak_mem_bytes: int
    quarter_peak_mem_bytes: int | None


def needed_flops(model: GPTNeoX, layout: Layout, stream_len: int) -> float:
    """Of a token, on average over its stream: 2 for each weight of a matrix product, the head's included,
    and 4 x layers x hidden for each key that it sees."""
    network = model.config.network
    weights = flops_per_token(network, model.config.vocab_size, seq_len=0) / 3  # forward alone
    filling = min(stream_len, layout.num_slots)
    num_seen = filling * (filling + 1) / 2 + (stream_len - filling) * layout.num_slots
    return weights + 4 * network.num_hidden_layers * network.hidden_size * num_seen / stream_len


def loss_difference(cell: Cell) -> tuple[float, int]:
    """Largest difference in nats between blocks and steps, and how many steps of each stream it is over.

    The last of them come after the cache was full; on the CPU the first tokens are prefilled.
    """
    layout, device = cell.layout, cell.device
    num_tokens = layout.num_slots + CHECKED_PAST_FULL
    prefilled = max(0, num_tokens - MOST_CHECKED[device.type])
    cell = replace(cell, batch_size=min(CHECKED_STREAMS, cell.batch_size))
    tokens = cell.prompt(num_tokens + 1)
    targets = tokens[:, prefilled + 1 :]
    decoder = StreamingDecoder(cell.model, layout.sinks, layout.window, cell.batch_size)
    if prefilled:
        decoder.prefill(tokens[:, :prefilled])
    fed = tokens[:, prefilled:-1].unbind(1)
    steps = [
        token_losses(decoder.step(token)[:, None], target[:, None])
        for token, target in zip(fed, targets.unbind(1), strict=True)
    ]
    blocks = stream_loss(cell.model, tokens, layout.sinks, layout.window)[:, prefilled:]
    sink_ids = torch.tensor(cell.model.sink_ids, dtype=tokens.dtype, device=device)
    is_scored = ~torch.isin(targets, sink_ids)
    return float((torch.cat(steps, dim=1) - blocks).abs()[is_scored].max()), len(steps)


def score(cell: Cell, tokens: Tensor) -> Scored:
    """Time the blockwise losses of int64[batch, stream_len], warm."""
    first, layouts = quarter(tokens), [cell.layout]
    seconds_to_score(cell, layouts, first)
    first_peak = None
    if first.shape[1] >= FEWEST_WINDOWS * cell.layout.num_slots:
        reset_peak(cell.device)
        seconds_to_score(cell, layouts, first)
        first_peak = peak_bytes(cell.device)
    reset_peak(cell.device)
    return Scored(seconds_to_score(cell, layouts, tokens), peak_bytes(cell.device), first_peak)


def seconds_to_score(cell: Cell, layouts: Sequence[Layout], tokens: Tensor) -> float:
    """For each layout the losses of int64[batch, stream_len], one layout after the other."""

    def act() -> None:
        for layout in layouts:
            stream_loss(cell.model, tokens, layout.sinks, layout.window)

    return times_ms(act, 1, cell.device)[0] / 1e3


def steps_per_s(cell: Cell) -> float:
    """Tokens per second of all streams, stepped with the cache full."""
    contender = step_contender(cell)
    for _ in range(WARM_UP_STEPS[cell.device.type]):
        contender.decode()
    times = times_ms(contender.decode, STEPPED_TOKENS[cell.device.type], cell.device)
    return cell.batch_size * len(times) / sum(times) * 1e3


def quarter(tokens: Tensor) -> Tensor:
    """The beginning of each stream, a quarter of its length."""
    return tokens[:, : max(2, tokens.shape[1] // 4)]
