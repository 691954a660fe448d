"""Intervals and p-values of losses: right on simulated text, sane at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sinktrain.errors import DataError
from sinktrain.evaluation.statistics import (
    MAX_BLOCKS,
    Interval,
    block_sums,
    by_position,
    mean_interval,
    paired_difference,
)

Floats = NDArray[np.float64]


def correlated_noise(rng: np.random.Generator, *shape: int, reach: int = 8) -> Floats:
    """float64[*shape] of unit variance whose neighbours within ``reach`` along the last axis go together."""
    *outer, num_tokens = shape
    noise = rng.standard_normal((*outer, num_tokens + reach - 1))
    sums = np.cumsum(np.insert(noise, 0, 0.0, axis=-1), axis=-1)
    return (sums[..., reach:] - sums[..., :-reach]) / np.sqrt(reach)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240917)


def test_mean_interval_covers_the_truth_about_95_times_in_100_on_correlated_text(
    rng: np.random.Generator,
) -> None:
    texts = 3.0 + correlated_noise(rng, 300, 2, 4096)
    intervals = [mean_interval(text) for text in texts]
    covered = sum(i.low <= 3.0 <= i.high for i in intervals)
    assert 270 <= covered <= 297  # 285 +- 3 standard deviations


def test_blocks_matter_a_bootstrap_over_single_tokens_covers_too_little(rng: np.random.Generator) -> None:
    texts = correlated_noise(rng, 40, 1, 1024, reach=32)
    covered = sum(abs(i.mean) <= i.high - i.mean for i in (mean_interval(t, block_tokens=1) for t in texts))
    assert covered < 30


def test_paired_interval_and_p_value_are_calibrated_when_nothing_differs(rng: np.random.Generator) -> None:
    difficulty = 3.0 + correlated_noise(rng, 300, 2, 4096)
    a, b = (difficulty + 0.1 * correlated_noise(rng, 300, 2, 4096) for _ in range(2))
    differences = [paired_difference(x, y) for x, y in zip(a, b, strict=True)]
    assert 270 <= sum(d.low <= 0 <= d.high for d in differences) <= 297
    assert 0.4 <= np.mean([d.p for d in differences]) <= 0.6
    assert all((d.p >= 0.05) == (d.low <= 0 <= d.high) for d in differences if abs(d.p - 0.05) > 0.003)


def test_pairing_is_much_narrower_when_arms_share_the_difficulty_of_tokens(rng: np.random.Generator) -> None:
    difficulty = 3.0 + correlated_noise(rng, 4, 8192)
    a = difficulty + 0.05 + 0.1 * correlated_noise(rng, 4, 8192)
    b = difficulty + 0.1 * correlated_noise(rng, 4, 8192)
    paired = paired_difference(a, b)
    unpaired_width = np.hypot(*(width(mean_interval(x)) for x in (a, b)))
    assert paired.high - paired.low < unpaired_width / 5
    assert paired.low <= 0.05 <= paired.high
    assert paired.p < 0.01


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_identical_losses_differ_by_nothing_with_p_1(rng: np.random.Generator) -> None:
    losses = correlated_noise(rng, 2, 2048)
    difference = paired_difference(losses, losses)
    assert (difference.delta_nats, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_difference_changes_sign_with_the_order_of_the_arms(rng: np.random.Generator) -> None:
    a, b = correlated_noise(rng, 2, 2, 4096)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.delta_nats == -back.delta_nats
    assert there.low == pytest.approx(-back.high)
    assert there.p == pytest.approx(back.p)


def test_only_tokens_scored_in_both_are_compared(rng: np.random.Generator) -> None:
    a = correlated_noise(rng, 2, 512)
    b = a - 0.25
    a[:, :100] = np.nan
    b[:, 300:] = np.nan
    assert paired_difference(a, b).delta_nats == pytest.approx(0.25)


def test_mean_is_over_tokens_though_blocks_hold_unequal_numbers() -> None:
    losses = np.full((1, 256 * 20 + 5), 1.0)
    losses[0, -5:] = 1001.0
    assert mean_interval(losses).mean == pytest.approx(1 + 5000 / losses.size)


def test_same_input_gives_the_same_interval(rng: np.random.Generator) -> None:
    losses = correlated_noise(rng, 2, 4096)
    assert mean_interval(losses) == mean_interval(losses)


def test_block_sums_keep_every_scored_token_and_drop_empty_blocks(rng: np.random.Generator) -> None:
    losses = correlated_noise(rng, 2, 5000)
    losses[:, :600] = np.nan
    sums, counts = block_sums(losses)
    assert counts.sum() == 2 * 4400
    assert sums.sum() == pytest.approx(np.nansum(losses))
    assert len(sums) == 2 * 18  # the last of 20 blocks is short; the first two are empty


def test_short_texts_get_shorter_blocks_and_long_ones_longer() -> None:
    assert len(block_sums(np.ones((1, 1000)))[0]) == 17
    assert len(block_sums(np.ones((1, 1_000_000)))[0]) <= MAX_BLOCKS + 1


def test_interval_of_few_blocks_still_covers(rng: np.random.Generator) -> None:
    intervals = [mean_interval(text) for text in rng.standard_normal((400, 1, 64))]
    assert sum(i.low <= 0 <= i.high for i in intervals) >= 366  # 380 - 3 standard deviations


def test_too_few_tokens_is_one_clear_line() -> None:
    losses = np.full((2, 40), np.nan)
    losses[0, :15] = 1.0
    with pytest.raises(DataError, match=r"^only 15 tokens to score, .* use a longer text .*$"):
        mean_interval(losses)


def test_by_position_means_in_equal_bins() -> None:
    losses = np.array([[np.nan, 1.0, 2.0, 3.0, 4.0], [np.nan, 3.0, 4.0, 5.0, np.nan]])
    stream_pos, loss_nats = by_position(losses, np.arange(10, 15), num_bins=2)
    np.testing.assert_allclose(stream_pos, [11.5, (13 + 13 + 14) / 3])
    np.testing.assert_allclose(loss_nats, [2.5, 4.0])


def test_by_position_has_no_more_bins_than_positions_and_none_without_tokens() -> None:
    stream_pos, loss_nats = by_position(np.array([[1.0, 2.0]]), np.array([4, 5]))
    assert (stream_pos.tolist(), loss_nats.tolist()) == ([4, 5], [1, 2])
    assert by_position(np.full((1, 3), np.nan), np.arange(3))[0].size == 0
