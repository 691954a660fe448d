"""Paired windows: which samples make up which batch, by arithmetic alone, and where the sinks go.

A sample i is ``t[i*L : i*L + L + 1]`` of the concatenated corpus. Its place in the training order
is a keyed permutation of i, so that (seed, samples_consumed) is all the state there is: the same
on every rank, and independent of world size, workers and micro-batch. Every arm reads the same
windows in the same order; sinks are inserted when a batch is made.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinktrain.data.tokenizer import RESERVED_SINKS

IGNORED = -100
"""Target of a position that is not scored."""

NUM_ROUNDS = 6


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Samples of ``seq_len`` inputs and as many targets that a corpus holds."""
    return max(0, (num_tokens - 1) // seq_len)


def window_order(first: int, count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Windows that the samples ``first`` to ``first + count - 1`` of a run read.

    Args:
        first: samples consumed before.
        count: samples wanted; may cross into the next epoch, which has its own order.
        total: windows in the corpus.
        seed: of the run.

    Returns:
        int64[count], each in 0..total-1; every epoch visits each window once.
    """
    sample = np.arange(first, first + count)
    epoch = sample // total
    order = np.empty(count, dtype=np.int64)
    for number in np.unique(epoch):
        chosen = epoch == number
        order[chosen] = permute(sample[chosen] - number * total, total, key=(seed, int(number)))
    return order


def permute(position: NDArray[np.int64], total: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """A keyed permutation of 0..total-1, computed on the fly: a Feistel network that walks its cycles.

    Args:
        position: int64[count], each in 0..total-1.

    Returns:
        int64[count], distinct for distinct positions.
    """
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    round_keys = np.random.SeedSequence(key).generate_state(NUM_ROUNDS, np.uint64).astype(np.uint64)
    walked = _feistel(position.astype(np.uint64), half_bits, round_keys)
    while (outside := walked >= total).any():
        walked[outside] = _feistel(walked[outside], half_bits, round_keys)
    return walked.astype(np.int64)


def insert_sinks(windows: Tensor, sink_ids: Tensor, score_sink: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch of windows.

    Args:
        windows: int64[batch, seq + 1], plain tokens t.
        sink_ids: int64[k]; empty for vanilla.
        score_sink: whether the last sink's prediction of t[0] is scored; earlier sinks never are.

    Returns:
        inputs: int64[batch, seq], the sinks, then t[0 : seq - k].
        targets: int64[batch, seq], the token after each input; ``IGNORED`` where nothing is scored.
    """
    batch, seq_len, num_sinks = len(windows), windows.shape[1] - 1, len(sink_ids)
    if num_sinks == 0:
        return windows[:, :-1], windows[:, 1:]
    inputs = torch.cat((sink_ids.expand(batch, -1), windows[:, : seq_len - num_sinks]), dim=1)
    unscored = windows.new_full((batch, num_sinks - 1 if score_sink else num_sinks), IGNORED)
    first = 0 if score_sink else 1
    targets = torch.cat((unscored, windows[:, first : seq_len - num_sinks + 1]), dim=1)
    return inputs, targets


def shared_targets(seq_len: int, num_sinks: int) -> slice:
    """Where an arm's targets hold t[1] to t[seq - 8], which all arms score, whatever their sinks."""
    return slice(num_sinks, num_sinks + seq_len - RESERVED_SINKS)


def _feistel(value: NDArray[np.uint64], half_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> bits, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); uint64 arithmetic wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
