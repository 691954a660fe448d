"""Intervals and p-values of losses: right on simulated text, as scipy has them, sane at the edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.signal import lfilter

from sinktrain.errors import DataError
from sinktrain.evaluation.statistics import (
    MAX_CORRELATION,
    NUM_BLOCKS,
    Interval,
    block_sums,
    by_position,
    mean_interval,
    mean_of_seeds,
    paired_difference,
    t_difference,
    welch_difference,
)

Floats = NDArray[np.float64]
Simulate = Callable[[np.random.Generator], Floats]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240917)


def width(interval: Interval) -> float:
    return interval.high - interval.low


# -- coverage on simulated text -------------------------------------------------------------------


def independent(num_tokens: int) -> Simulate:
    """Differences of tokens that know nothing of each other: float64[1, token] around zero."""
    return lambda rng: rng.standard_normal((1, num_tokens))


def skewed(num_tokens: int) -> Simulate:
    return lambda rng: rng.lognormal(0.0, 1.5, (1, num_tokens)) - math.exp(1.5**2 / 2)


def like_text(num_tokens: int, num_documents: int, spread: float = 0.1, rho: float = 0.3) -> Simulate:
    """Differences as two models have them on real text: float64[4, token] around zero.

    Heavy tails (Student's t with 4 degrees of freedom), neighbours that go together (AR(1)), and documents
    of lognormal lengths, on each of which one model is better than on others by ``spread`` times the
    deviation of a token. (Measured on two quickstart models over 586 documents: the variance of the mean of
    1,024 tokens is 4 times that of independent tokens, of 16,384 tokens 24 times.)
    """

    def simulate(rng: np.random.Generator) -> Floats:
        noise = rng.standard_t(4, num_tokens + 50) / math.sqrt(2)
        tokens = lfilter([math.sqrt(1 - rho**2)], [1, -rho], noise)[50:]
        mean_len = num_tokens / num_documents
        lengths = np.maximum(8, rng.lognormal(math.log(mean_len) - 0.5, 1.0, 4 * num_documents + 20))
        documents = np.repeat(rng.standard_normal(len(lengths)) * spread, lengths.astype(int))
        first = rng.integers(int(lengths[0]))
        return np.asarray(tokens + documents[first : first + num_tokens]).reshape(4, -1)

    return simulate


def measured_coverage(simulate: Simulate, num_pairs: int, rng: np.random.Generator) -> tuple[float, float]:
    """Share of pairs whose interval holds the true difference; share with p < 0.05 where there is none."""
    covered = false_positives = 0
    for _ in range(num_pairs):
        difference = simulate(rng)
        b = 3.0 + rng.standard_normal(difference.shape)
        with_effect, without = (
            paired_difference(b + difference + 0.05, b),
            paired_difference(difference, 0 * b),
        )
        covered += with_effect.low <= 0.05 <= with_effect.high
        false_positives += without.p < 0.05
    return covered / num_pairs, false_positives / num_pairs


@pytest.mark.parametrize(
    "simulate",
    [
        pytest.param(independent(500), id="independent"),
        pytest.param(like_text(2048, 60, 0.3), id="like text"),
    ],
)
def test_intervals_cover_the_true_difference_about_95_times_in_100(
    simulate: Simulate, rng: np.random.Generator
) -> None:
    coverage, false_positives = measured_coverage(simulate, 400, rng)
    assert 0.915 <= coverage <= 0.985
    assert 0.015 <= false_positives <= 0.085


@pytest.mark.slow
@pytest.mark.parametrize(
    "simulate",
    [
        pytest.param(independent(32), id="32 independent tokens"),
        pytest.param(independent(1000), id="1,000 independent tokens"),
        pytest.param(independent(65_536), id="65,536 independent tokens"),
        pytest.param(skewed(4096), id="4,096 skewed tokens"),
        pytest.param(like_text(1024, 1024, 0.0, rho=0.8), id="1,024 tokens, neighbours alike"),
        pytest.param(like_text(4096, 100, 0.1), id="4,096 tokens, 100 documents"),
        pytest.param(like_text(16_384, 100, 0.3), id="16,384 tokens, 100 documents, far apart"),
        pytest.param(like_text(16_384, 1000, 0.3), id="16,384 tokens, 1,000 documents, far apart"),
        pytest.param(like_text(65_536, 100, 0.05), id="65,536 tokens, 100 documents"),
        pytest.param(like_text(65_536, 1000, 0.3), id="65,536 tokens, 1,000 documents, far apart"),
    ],
)
def test_over_2000_pairs_coverage_is_93_to_97_and_false_positives_3_to_7_percent(
    simulate: Simulate, rng: np.random.Generator
) -> None:
    coverage, false_positives = measured_coverage(simulate, 2000, rng)
    print(f"coverage {coverage:.4f}, p < 0.05 {false_positives:.4f}")
    assert 0.93 <= coverage <= 0.97
    assert 0.03 <= false_positives <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_documents", "spread", "low", "high"),
    [(30, 0.1, 0.90, 0.94), (30, 0.3, 0.90, 0.94), (10, 0.1, 0.80, 0.88), (10, 0.3, 0.80, 0.88)],
)
def test_a_text_of_few_documents_covers_less_as_the_module_says(
    num_documents: int, spread: float, low: float, high: float, rng: np.random.Generator
) -> None:
    coverage, _ = measured_coverage(like_text(16_384, num_documents, spread), 2000, rng)
    print(f"coverage {coverage:.4f}")
    assert low <= coverage <= high


def test_mean_interval_covers_the_truth_about_95_times_in_100(rng: np.random.Generator) -> None:
    simulate = like_text(2048, 60, 0.3)
    intervals = [mean_interval(3.0 + simulate(rng)) for _ in range(300)]
    assert 0.91 <= np.mean([i.low <= 3.0 <= i.high for i in intervals]) <= 0.985


def test_intervals_are_hardly_wider_than_they_must_be(rng: np.random.Generator) -> None:
    intervals = [mean_interval(rng.standard_normal((1, 500))) for _ in range(400)]
    spread = np.std([interval.mean for interval in intervals])
    assert 1.0 <= np.mean([width(interval) for interval in intervals]) / (2 * 1.96 * spread) <= 1.2


def test_p_values_are_uniform_and_agree_with_the_interval_when_nothing_differs(
    rng: np.random.Generator,
) -> None:
    zeros = np.zeros((1, 500))
    differences = [paired_difference(rng.standard_normal((1, 500)), zeros) for _ in range(300)]
    assert 0.44 <= np.mean([d.p for d in differences]) <= 0.56
    assert all((d.p >= 0.05) == (d.low <= 0 <= d.high) for d in differences if abs(d.p - 0.05) > 0.003)


def test_pairing_is_much_narrower_when_arms_share_the_difficulty_of_tokens(rng: np.random.Generator) -> None:
    simulate = like_text(8192, 100)
    difficulty = 3.0 + simulate(rng)
    a, b = difficulty + 0.05 + 0.1 * simulate(rng), difficulty + 0.1 * simulate(rng)
    paired = paired_difference(a, b)
    assert paired.high - paired.low < np.hypot(width(mean_interval(a)), width(mean_interval(b))) / 4
    assert paired.low <= 0.05 <= paired.high
    assert paired.p < 0.01


# -- as scipy has it ------------------------------------------------------------------------------


def widening(block_means: Floats) -> float:
    """The module's formula, from scipy's distributions and a correlation written out."""
    n, mean = len(block_means), block_means.mean()
    lagged = sum((x - mean) * (y - mean) for x, y in itertools.pairwise(block_means))
    r = lagged / sum((x - mean) ** 2 for x in block_means)
    r = min(max(r + (1 + 4 * r) / n, 0.0), MAX_CORRELATION)
    few = stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) * math.sqrt(n / (n - 1))
    return float(few * math.sqrt((1 + r) / (1 - r)))


@pytest.mark.parametrize(
    "simulate",
    [
        pytest.param(independent(32 * 64), id="independent"),
        pytest.param(independent(20), id="20 tokens"),
        pytest.param(like_text(32 * 64, 12, 1.0), id="like text"),
    ],
)
def test_interval_is_scipys_percentile_bootstrap_over_block_means_widened(
    simulate: Simulate, rng: np.random.Generator
) -> None:
    losses = simulate(rng)
    sums, counts = block_sums(losses)
    block_means = sums / counts
    result = stats.bootstrap((block_means,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    interval, mean = mean_interval(losses), block_means.mean()
    for ours, theirs in zip((interval.low, interval.high), result.confidence_interval, strict=True):
        assert ours - mean == pytest.approx((theirs - mean) * widening(block_means), rel=0.1)


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 12])
def test_t_difference_is_scipys_one_sample_t_test(num_seeds: int, rng: np.random.Generator) -> None:
    deltas = rng.normal(0.02, 0.05, num_seeds).tolist()
    expected = stats.ttest_1samp(deltas, 0.0)
    found, limits = t_difference(deltas), expected.confidence_interval(0.95)
    assert found.delta_nats == pytest.approx(np.mean(deltas))
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
    assert found.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (10, 2)])
def test_welch_difference_is_scipys_t_test_of_unequal_variances(
    sizes: tuple[int, int], rng: np.random.Generator
) -> None:
    a, b = rng.normal(3.0, 0.05, sizes[0]).tolist(), rng.normal(3.1, 0.2, sizes[1]).tolist()
    expected = stats.ttest_ind(a, b, equal_var=False)
    found, limits = welch_difference(a, b), expected.confidence_interval(0.95)
    assert found.delta_nats == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
    assert found.p == pytest.approx(expected.pvalue)


def test_mean_of_seeds_has_the_interval_of_scipys_one_sample_t_test(rng: np.random.Generator) -> None:
    losses = 3.0 + 0.01 * rng.standard_normal(4)
    found, expected = mean_of_seeds(losses.tolist()), stats.ttest_1samp(losses, 0.0).confidence_interval(0.95)
    assert (found.mean, found.deviation) == pytest.approx((losses.mean(), losses.std(ddof=1)), rel=1e-12)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_arm_that_varies_least_of_seven_is_often_left_by_another_seed(rng: np.random.Generator) -> None:
    studies = rng.normal(size=(2000, 7, 4))  # three seeds of each arm, and one more
    least = studies[:, :, :3].std(axis=2).argmin(axis=1)
    of_least = studies[np.arange(len(studies)), least]
    expected = np.array([mean_of_seeds(arm[:3].tolist()).prediction for arm in of_least])
    is_inside = (expected[:, 0] <= of_least[:, 3]) & (of_least[:, 3] <= expected[:, 1])
    assert is_inside.mean() == pytest.approx(0.75, abs=0.03)  # as RESULTS.md says


@pytest.mark.parametrize("num_seeds", [2, 3, 6])
def test_another_seed_lies_where_it_is_expected_95_times_in_100(
    num_seeds: int, rng: np.random.Generator
) -> None:
    num_studies = 4000
    losses = 3.0 + 0.02 * rng.standard_normal((num_studies, num_seeds + 1))
    expected = [mean_of_seeds(study[:-1].tolist()).prediction for study in losses]
    inside = sum(low <= study[-1] <= high for (low, high), study in zip(expected, losses, strict=True))
    assert abs(inside / num_studies - 0.95) < 0.015


def test_seeds_that_all_agree_leave_no_doubt() -> None:
    for found in (t_difference([0.25, 0.25]), welch_difference([3.25, 3.25], [3.0, 3.0])):
        assert (found.delta_nats, found.low, found.high, found.p) == (0.25, 0.25, 0.25, 0.0)
    for same in (t_difference([0.0, 0.0]), welch_difference([3.0, 3.0], [3.0, 3.0])):
        assert (same.delta_nats, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "asked",
    [lambda: t_difference([0.1]), lambda: welch_difference([3.0, 3.1], [2.9]), lambda: mean_of_seeds([3.0])],
    ids=["t", "welch", "mean"],
)
def test_one_seed_is_one_clear_line(asked: Callable[[], object]) -> None:
    expected = r"an interval over seeds needs 2 seeds or more of each arm, here 1; train more seeds"
    with pytest.raises(DataError, match=f"^{expected}$"):
        asked()


# -- blocks ---------------------------------------------------------------------------------------


def test_documents_longer_than_blocks_widen_the_interval(rng: np.random.Generator) -> None:
    """Blocks in another order hold the same numbers, so that only the correlation of neighbours is lost."""
    blocks = np.repeat(rng.standard_normal(8), 4)[:, None] + 0.1 * rng.standard_normal((32, 64))
    in_order, shuffled = (mean_interval(some.reshape(1, -1)) for some in (blocks, rng.permutation(blocks)))
    assert in_order.mean == pytest.approx(shuffled.mean)
    assert width(in_order) > 1.5 * width(shuffled)


@pytest.mark.parametrize(
    ("shape", "num_blocks"), [((4, 1000), 32), ((1, 33), 32), ((100, 50), 32), ((2, 9), 18)]
)
def test_blocks_are_equal_parts_of_the_text_in_its_order(
    shape: tuple[int, int], num_blocks: int, rng: np.random.Generator
) -> None:
    losses = rng.standard_normal(shape)
    sums, counts = block_sums(losses)
    assert len(sums) == len(counts) == num_blocks
    assert np.ptp(counts) <= 1
    ends = np.cumsum(counts).astype(int)
    expected = [part.sum() for part in np.split(losses.ravel(), ends[:-1])]
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_blocks_hold_scored_tokens_only(rng: np.random.Generator) -> None:
    losses = rng.standard_normal((2, 5000))
    losses[:, :600] = np.nan
    sums, counts = block_sums(losses)
    assert len(sums) == NUM_BLOCKS
    assert counts.sum() == 2 * 4400
    assert sums.sum() == pytest.approx(np.nansum(losses))


def test_a_text_without_a_scored_token_has_no_blocks() -> None:
    sums, counts = block_sums(np.full((2, 10), np.nan))
    assert sums.size == counts.size == 0


def test_mean_is_over_tokens_though_blocks_hold_unequal_numbers(rng: np.random.Generator) -> None:
    losses = rng.standard_normal((1, 32 * 3 + 5))
    assert mean_interval(losses).mean == pytest.approx(losses.mean(), abs=1e-12)


# -- edges ----------------------------------------------------------------------------------------


def test_identical_losses_differ_by_nothing_with_p_1(rng: np.random.Generator) -> None:
    losses = rng.standard_normal((2, 2048))
    difference = paired_difference(losses, losses)
    assert (difference.delta_nats, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_difference_changes_sign_with_the_order_of_the_arms(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 2, 4096))
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.delta_nats == -back.delta_nats
    assert there.low == pytest.approx(-back.high)
    assert there.p == pytest.approx(back.p)


def test_only_tokens_scored_in_both_are_compared(rng: np.random.Generator) -> None:
    a = rng.standard_normal((2, 512))
    b = a - 0.25
    a[:, :100] = np.nan
    b[:, 300:] = np.nan
    assert paired_difference(a, b).delta_nats == pytest.approx(0.25)


def test_same_input_gives_the_same_interval(rng: np.random.Generator) -> None:
    losses = rng.standard_normal((2, 4096))
    assert mean_interval(losses) == mean_interval(losses)
    assert mean_interval(losses) != mean_interval(losses, seed=1)


def test_too_few_tokens_is_one_clear_line() -> None:
    losses = np.full((2, 40), np.nan)
    losses[0, :15] = 1.0
    with pytest.raises(DataError, match=r"^only 15 tokens to score, .* use a longer text .*$"):
        mean_interval(losses)


def test_by_position_means_in_bins_that_grow_by_a_factor() -> None:
    losses = np.array([[np.nan, 1.0, 2.0, 3.0, 4.0], [np.nan, 3.0, 4.0, 5.0, np.nan]])
    stream_pos, loss_nats = by_position(losses, np.array([0, 1, 3, 15, 63]), num_bins=5)
    np.testing.assert_allclose(stream_pos, [1, 3, 15, 63])
    np.testing.assert_allclose(loss_nats, [2, 3, 4, 4])
    stream_pos, loss_nats = by_position(losses, np.array([0, 1, 3, 15, 63]), num_bins=2)
    np.testing.assert_allclose(stream_pos, [(1 + 1 + 3 + 3) / 4, (15 + 15 + 63) / 3])
    np.testing.assert_allclose(loss_nats, [2.5, 4.0])


def test_by_position_has_no_more_bins_than_positions_and_none_without_tokens() -> None:
    stream_pos, loss_nats = by_position(np.array([[1.0, 2.0]]), np.array([4, 5]))
    assert (stream_pos.tolist(), loss_nats.tolist()) == ([4, 5], [1, 2])
    assert by_position(np.full((1, 3), np.nan), np.arange(3))[0].size == 0
