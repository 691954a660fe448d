"""Means of per-token losses, their differences, and how sure both are: over the text, and over seeds.

Axes: stream (parallel streams cut from one text, in its order), token, block, resample. Losses are in
nats; NaN marks a token that was not scored.

**Over the text**: how the figure would move on other text of this kind, for these very models. Losses
are correlated, between neighbours and throughout a document, so intervals come from a bootstrap over
32 blocks of neighbouring tokens, however long the text: 2,000 resamples of (sum, count) per block, each
giving sum / count. So few blocks are as long as they can be, and cost little: Student's t is 4% wider than
the normal. The deviations are widened for what blocks leave,

    t / z * sqrt(n / (n - 1)) * sqrt((1 + r) / (1 - r))

with n blocks, Student's t and normal quantiles t and z, and r the correlation of neighbouring blocks, above
zero where documents are longer than blocks. In simulations (tests/test_statistics.py) such intervals cover
the truth 93 to 97 times in 100 where a text holds 100 documents or more, 91 to 94 times at 30 and only 82 to
87 at 10: little tells how further documents would differ.

**Over seeds**: how the figure would move with other initial weights and data orders, on this very text.
Student's t on one number per seed, paired where both arms have the same seeds, Welch's otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

from sinktrain.errors import DataError

Floats = NDArray[np.float64]

NUM_BLOCKS = 32
MIN_BLOCKS = 16
MAX_CORRELATION = 0.8
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
    """A mean of ``a - b`` in nats, its 95% interval (over the text or over seeds) and two-sided p-value."""

    delta_nats: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds, in the unit of its values.

    Args:
        mean: of the seeds.
        deviation: standard deviation of a seed.
        interval: 95%, of the mean.
        prediction: 95%, of another seed.
    """

    mean: float
    deviation: float
    interval: tuple[float, float]
    prediction: tuple[float, float]


def mean_interval(losses: Floats, seed: int = 0) -> Interval:
    """Mean loss over all scored tokens, with its interval over the text.

    Args:
        losses: float64[stream, token], nats; NaN = not scored.
        seed: of the resampling; the same input gives the same interval.

    Raises:
        DataError: fewer than 16 tokens are scored.
    """
    mean, deviations = _bootstrap(losses, seed)
    low, high = _limits(mean, deviations)
    return Interval(mean, low, high)


def paired_difference(a: Floats, b: Floats, seed: int = 0) -> Difference:
    """Mean of ``a - b`` over the tokens scored in both, which must be the same text tokens.

    The p-value is read from the same resamples as the interval: twice the share of them that reach
    zero from the side of the mean, at least ``2 / (NUM_RESAMPLES + 1)`` and at most 1 (also for identical
    input). So p < 0.05 and an interval without zero are one statement.

    Args:
        a: float64[stream, token], nats; NaN = not scored.
        b: the same shape.
        seed: as in ``mean_interval``.

    Raises:
        DataError: fewer than 16 tokens are scored in both.
    """
    assert a.shape == b.shape, f"not the same tokens: {a.shape} and {b.shape}"
    mean, deviations = _bootstrap(a - b, seed)
    low, high = _limits(mean, deviations)
    resampled = mean + deviations
    reaching_zero = min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))
    p = min(1.0, 2 * (1 + int(reaching_zero)) / (1 + NUM_RESAMPLES))
    return Difference(mean, low, high, p)


def t_difference(deltas: Sequence[float]) -> Difference:
    """Mean of ``a - b`` over seeds that both arms have, by Student's paired t.

    Args:
        deltas: ``a - b`` of each seed, nats.

    Raises:
        DataError: fewer than 2 seeds.
    """
    mean, squared_error = _mean_of_seeds(deltas)
    return _by_t(mean, squared_error, len(deltas) - 1)


def mean_of_seeds(values: Sequence[float]) -> SeedMean:
    """Mean over seeds, the interval of the mean, and the one where another seed's value is to be expected.

    Both are Student's t: the mean's error is ``s / sqrt(n)``, another seed's ``s * sqrt(1 + 1 / n)``, with
    ``s`` the standard deviation of ``n`` seeds.

    Args:
        values: one per seed: losses in nats, shares, ratios.

    Raises:
        DataError: fewer than 2 seeds.
    """
    mean, squared_error = _mean_of_seeds(values)
    reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(squared_error)
    further = reach * math.sqrt(len(values) + 1)
    deviation = math.sqrt(squared_error * len(values))
    return SeedMean(mean, deviation, (mean - reach, mean + reach), (mean - further, mean + further))


def welch_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of ``a`` less mean of ``b`` where the seeds of two arms differ, by Welch's t.

    Args:
        a, b: one loss per seed, nats.

    Raises:
        DataError: fewer than 2 seeds of either.
    """
    (a_mean, a_squared), (b_mean, b_squared) = _mean_of_seeds(a), _mean_of_seeds(b)
    squared_error = a_squared + b_squared
    spread = a_squared**2 / (len(a) - 1) + b_squared**2 / (len(b) - 1)
    freedom = squared_error**2 / spread if spread else 1.0
    return _by_t(a_mean - b_mean, squared_error, freedom)


def by_position(losses: Floats, stream_pos: NDArray[np.int64], num_bins: int = 64) -> tuple[Floats, Floats]:
    """Mean loss in bins of stream position, which grow by a constant factor: evictions come early.

    Args:
        losses: float64[stream, token], nats; NaN = not scored.
        stream_pos: int64[token], position of each scored token in its stream.
        num_bins: at most; a bin holds one position or more.

    Returns:
        ``(stream_pos, loss_nats)``, both float64[bin]: mean position and mean loss of a bin's tokens; bins
        without any are left out.
    """
    scored = ~np.isnan(losses)
    loss_nats = losses[scored]
    positions = np.broadcast_to(stream_pos, losses.shape)[scored]
    if not positions.size:
        return np.empty(0), np.empty(0)
    growth = np.log1p(positions) - np.log1p(positions.min())
    bins = np.minimum(growth / (growth.max() or 1.0) * num_bins, num_bins - 1).astype(np.int64)
    counts = np.bincount(bins, minlength=num_bins)
    filled = counts > 0
    pos_sums, loss_sums = (np.bincount(bins, weights, num_bins) for weights in (positions, loss_nats))
    return pos_sums[filled] / counts[filled], loss_sums[filled] / counts[filled]


def block_sums(values: Floats) -> tuple[Floats, Floats]:
    """Sum and number of the scored values in each block of neighbouring tokens.

    The scored tokens of all streams, in the order of the text, are cut into ``NUM_BLOCKS`` equal parts, or
    one for each where there are fewer; parts differ by one token at most.

    Args:
        values: float64[stream, token]; NaN = not scored.

    Returns:
        ``(sums, counts)``, both float64[block].
    """
    scored = values[~np.isnan(values)]
    num_blocks = min(NUM_BLOCKS, len(scored))
    block = np.arange(len(scored)) * num_blocks // max(1, len(scored))
    counts = np.bincount(block, minlength=num_blocks).astype(np.float64)
    return np.bincount(block, scored, num_blocks).astype(np.float64), counts


def _bootstrap(values: Floats, seed: int) -> tuple[float, Floats]:
    """Mean of the scored values and the widened deviations of resampled means from it: float64[resample]."""
    sums, counts = block_sums(values)
    if len(sums) < MIN_BLOCKS:
        raise DataError(
            f"only {int(counts.sum())} tokens to score, too few for an interval; use a longer text "
            f"(at least {MIN_BLOCKS} tokens after the first window)"
        )
    mean = sums.sum() / counts.sum()
    drawn = _times_drawn(len(sums), seed)
    resampled = (drawn @ sums) / (drawn @ counts)
    return float(mean), (resampled - mean) * _widening(sums / counts)


@lru_cache(maxsize=8)
def _times_drawn(num_blocks: int, seed: int) -> Floats:
    """How often each resample draws each block, with replacement: float64[resample, block]."""
    shares = np.full(num_blocks, 1 / num_blocks)
    return np.random.default_rng(seed).multinomial(num_blocks, shares, NUM_RESAMPLES).astype(np.float64)


def _limits(mean: float, deviations: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(deviations, [tail, 1 - tail])
    return float(mean + low), float(mean + high)


def _widening(block_means: Floats) -> float:
    """How much wider than the plain bootstrap's an interval from such blocks must be."""
    num_blocks = len(block_means)
    r = _neighbour_correlation(block_means)
    upper = (1 + CONFIDENCE) / 2
    few_blocks = stdtrit(num_blocks - 1, upper) / ndtri(upper) * math.sqrt(num_blocks / (num_blocks - 1))
    return float(few_blocks * math.sqrt((1 + r) / (1 - r)))


def _neighbour_correlation(block_means: Floats) -> float:
    """Correlation of neighbouring blocks, from 0 to ``MAX_CORRELATION``.

    An estimate from n blocks is low by ``(1 + 4 r) / n`` on average (Marriott and Pope 1954), which is
    put back.
    """
    deviations = block_means - block_means.mean()
    variance = float(deviations @ deviations)
    if not variance:
        return 0.0
    r = float(deviations[1:] @ deviations[:-1]) / variance
    r += (1 + 4 * r) / len(block_means)
    return min(max(r, 0.0), MAX_CORRELATION)


def _mean_of_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the square of its standard error."""
    if len(values) < 2:
        raise DataError(
            f"an interval over seeds needs 2 seeds or more of each arm, here {len(values)}; train more seeds"
        )
    return float(np.mean(values)), float(np.var(values, ddof=1)) / len(values)


def _by_t(mean: float, squared_error: float, freedom: float) -> Difference:
    error = math.sqrt(squared_error)
    if not error:
        return Difference(mean, mean, mean, p=0.0 if mean else 1.0)
    reach = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Difference(mean, mean - reach, mean + reach, p)
