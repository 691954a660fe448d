"""Means of per-token losses, their differences, and how sure both are over the text.

Axes: stream (parallel streams cut from one text), token, block, resample. Losses are in nats; NaN marks
a token that was not scored.

Losses of neighbouring tokens are correlated, so intervals come from a bootstrap over blocks of
neighbouring tokens: 2,000 resamples of (sum, count) per block, each giving sum / count, so that a short
block weighs what it holds. The deviations are widened from normal to Student's t, as few blocks need:
``t * sqrt(n / (n - 1)) / z``. They tell how the figure would move on other text of this kind; they say
nothing about another training seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sinktrain.errors import DataError

Floats = NDArray[np.float64]

BLOCK_TOKENS = 256
MIN_BLOCKS = 16
MAX_BLOCKS = 1024
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean in nats and its 95% interval over the text."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean of ``a - b`` in nats, its 95% interval over the text and its two-sided p-value."""

    delta_nats: float
    low: float
    high: float
    p: float


def mean_interval(losses: Floats, block_tokens: int = BLOCK_TOKENS, seed: int = 0) -> Interval:
    """Mean loss over all scored tokens, with its interval.

    Args:
        losses: float64[stream, token], nats; NaN = not scored.
        block_tokens: length of a block; see ``block_sums`` for when it is another.
        seed: of the resampling; the same input gives the same interval.

    Raises:
        DataError: fewer than 16 tokens are scored.
    """
    mean, deviations = _bootstrap(losses, block_tokens, seed)
    low, high = _limits(mean, deviations)
    return Interval(mean, low, high)


def paired_difference(a: Floats, b: Floats, block_tokens: int = BLOCK_TOKENS, seed: int = 0) -> Difference:
    """Mean of ``a - b`` over the tokens scored in both, which must be the same text tokens.

    The p-value is read from the same resamples as the interval: twice the share of them that reach
    zero from the side of the mean, at least ``2 / (NUM_RESAMPLES + 1)`` and at most 1 (also for identical
    input). So p < 0.05 and an interval without zero are one statement.

    Args:
        a: float64[stream, token], nats; NaN = not scored.
        b: the same shape.
        block_tokens: as in ``mean_interval``.
        seed: as in ``mean_interval``.

    Raises:
        DataError: fewer than 16 tokens are scored in both.
    """
    assert a.shape == b.shape, f"not the same tokens: {a.shape} and {b.shape}"
    mean, deviations = _bootstrap(a - b, block_tokens, seed)
    low, high = _limits(mean, deviations)
    resampled = mean + deviations
    reaching_zero = min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))
    p = min(1.0, 2 * (1 + reaching_zero) / (1 + NUM_RESAMPLES))
    return Difference(mean, low, high, p)


def by_position(losses: Floats, stream_pos: NDArray[np.int64], num_bins: int = 64) -> tuple[Floats, Floats]:
    """Mean loss in equal bins of stream position; bins without a scored token are left out.

    Args:
        losses: float64[stream, token], nats; NaN = not scored.
        stream_pos: int64[token], position of each scored token in its stream.
        num_bins: at most; fewer positions than that get one bin each.

    Returns:
        ``(stream_pos, loss_nats)``, both float64[bin]: mean position and mean loss of a bin's tokens.
    """
    scored = ~np.isnan(losses)
    loss_nats = losses[scored]
    positions = np.broadcast_to(stream_pos, losses.shape)[scored]
    if not positions.size:
        return np.empty(0), np.empty(0)
    first, num_positions = positions.min(), int(np.ptp(positions)) + 1
    num_bins = min(num_bins, num_positions)
    bins = (positions - first) * num_bins // num_positions
    counts = np.bincount(bins, minlength=num_bins)
    filled = counts > 0
    pos_sums, loss_sums = (np.bincount(bins, weights, num_bins) for weights in (positions, loss_nats))
    return pos_sums[filled] / counts[filled], loss_sums[filled] / counts[filled]


def block_sums(values: Floats, block_tokens: int = BLOCK_TOKENS) -> tuple[Floats, Floats]:
    """Sum and number of the scored values in each block of neighbouring tokens of a stream.

    Blocks grow beyond ``block_tokens`` where a text would give more than about 1,024 of them (more cost
    time and add nothing), and shrink where it would give fewer than 16 (from so few the spread between
    blocks is known too badly, which hurts more than a little correlation does).

    Args:
        values: float64[stream, token]; NaN = not scored.

    Returns:
        ``(sums, counts)``, both float64[block]; blocks without a scored token are left out.
    """
    num_streams, num_tokens = values.shape
    num_scored = int(np.count_nonzero(~np.isnan(values)))
    block_tokens = min(max(block_tokens, num_scored // MAX_BLOCKS), max(1, num_scored // MIN_BLOCKS))
    padding = -num_tokens % block_tokens
    padded = np.pad(values, ((0, 0), (0, padding)), constant_values=np.nan)
    blocks = padded.reshape(num_streams, -1, block_tokens)
    sums = np.nansum(blocks, axis=2).ravel()
    counts = np.count_nonzero(~np.isnan(blocks), axis=2).ravel().astype(np.float64)
    return sums[counts > 0], counts[counts > 0]


def _bootstrap(values: Floats, block_tokens: int, seed: int) -> tuple[float, Floats]:
    """Mean of the scored values and the widened deviations of resampled means from it: float64[resample]."""
    sums, counts = block_sums(values, block_tokens)
    if len(sums) < MIN_BLOCKS:
        raise DataError(
            f"only {int(counts.sum())} tokens to score, too few for an interval; use a longer text "
            f"(at least {MIN_BLOCKS} tokens after the first window)"
        )
    mean = sums.sum() / counts.sum()
    drawn = np.random.default_rng(seed).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    resampled = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return float(mean), (resampled - mean) * _small_sample_widening(len(sums))


def _limits(mean: float, deviations: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(deviations, [tail, 1 - tail])
    return float(mean + low), float(mean + high)


def _small_sample_widening(num_blocks: int) -> float:
    """How much wider than the plain bootstrap's an interval from so few blocks must be.

    Student's t quantile is taken by its Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), which is
    within 0.001 from 16 blocks on.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    freedom = num_blocks - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(num_blocks / freedom)
