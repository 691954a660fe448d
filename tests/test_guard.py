"""What is skipped in training, against a twin in plain Python."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import skipped_steps

from sinktrain.training.guard import WINDOW, SpikeGuard

CPU = torch.device("cpu")


def judged(guard: SpikeGuard, losses: list[float], norms: list[float] | None = None) -> list[bool]:
    flags = []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        flag = guard.judge(torch.tensor(loss), torch.tensor(norm))
        assert (flag.dtype, flag.shape) == (torch.float32, ())
        assert float(flag) in (0.0, 1.0)
        flags.append(bool(flag))
    return flags


def noisy_losses(count: int, seed: int) -> list[float]:
    """Falling and noisy, one in forty a jump of 1 to 60 standard deviations, one in forty not finite."""
    draw = np.random.default_rng(seed)
    losses = 6 * np.exp(-np.arange(count) / 100) + 2 + 0.1 * draw.standard_normal(count)
    losses += np.where(draw.random(count) < 1 / 40, 0.1 * draw.uniform(1, 60, count), 0.0)
    broken = draw.choice([math.nan, math.inf, -math.inf], count)
    return [float(loss) for loss in np.where(draw.random(count) < 1 / 40, broken, losses).astype(np.float32)]


def noisy_norms(count: int, seed: int) -> list[float]:
    draw = np.random.default_rng(seed + 1000)
    return [float(norm) for norm in np.where(draw.random(count) < 1 / 50, math.nan, draw.random(count))]


@pytest.mark.parametrize("sigma", [None, 2.0, 6.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_guard_skips_what_its_twin_skips(sigma: float | None, seed: int) -> None:
    losses, norms = noisy_losses(500, seed), noisy_norms(500, seed)
    guard = SpikeGuard(sigma, CPU)
    expected = skipped_steps(losses, norms, sigma)
    assert judged(guard, losses, norms) == expected
    assert guard.skipped == sum(expected)
    finite = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in zip(losses, norms, strict=True)]
    spikes = sum(expected) - finite.count(False)
    assert (spikes > 0) == (sigma is not None)


@pytest.mark.parametrize("count", [WINDOW // 2 - 1, WINDOW // 2, WINDOW, 3 * WINDOW // 2, 2 * WINDOW + 1])
def test_a_spike_is_one_from_half_a_window_on(count: int) -> None:
    guard = SpikeGuard(6.0, CPU)
    calm = [2.0 + 0.01 * (step % 3) for step in range(count)]
    assert judged(guard, [*calm, 5.0, 2.0]) == [False] * count + [count >= WINDOW // 2, False]


def test_a_loss_far_below_the_others_is_no_spike() -> None:
    assert not any(judged(SpikeGuard(2.0, CPU), [2.0 + 0.01 * (step % 3) for step in range(100)] + [0.1]))


@pytest.mark.parametrize("loss", [2.3, 1e-3, 11.1])
def test_losses_that_do_not_change_are_no_spikes(loss: float) -> None:
    """Their standard deviation is 0 but for rounding, and so is their distance from the mean."""
    assert not any(judged(SpikeGuard(6.0, CPU), [loss] * 300))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_norm", [False, True])
def test_what_is_not_finite_is_skipped_and_never_enters_the_window(broken: float, is_norm: bool) -> None:
    """With a NaN in the window every comparison is false: in OLMo-core, 128 steps without the guard."""
    guard, undisturbed = SpikeGuard(6.0, CPU), SpikeGuard(6.0, CPU)
    calm = [2.0 + 0.01 * (step % 3) for step in range(100)]
    judged(undisturbed, [*calm, *calm])
    flags = [
        *judged(guard, calm),
        *judged(guard, [2.0 if is_norm else broken] * 3, [broken if is_norm else 1.0] * 3),
        *judged(guard, calm),
    ]
    assert flags == [False] * 100 + [True] * 3 + [False] * 100
    assert torch.equal(guard.state_dict()["_losses"], undisturbed.state_dict()["_losses"])
    assert judged(guard, [5.0]) == [True]


def test_a_run_of_nothing_but_nan_skips_every_step() -> None:
    guard = SpikeGuard(6.0, CPU)
    assert all(judged(guard, [math.nan] * 200))
    assert guard.skipped == guard.skipped_in_a_row == 200


def test_steps_skipped_in_a_row_are_counted_until_one_is_not() -> None:
    guard, seen = SpikeGuard(None, CPU), []
    for loss in (1.0, math.nan, math.inf, 1.0, math.nan, math.nan, math.nan, 1.0):
        judged(guard, [loss])
        seen.append((guard.skipped, guard.skipped_in_a_row))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (4, 2), (5, 3), (5, 0)]


@pytest.mark.parametrize("middle", [1, 60, 200, 301])
def test_a_restored_guard_goes_on_as_the_one_that_was_saved(middle: int, tmp_path: Path) -> None:
    losses, norms = noisy_losses(500, seed=9), noisy_norms(500, seed=9)
    whole, first, second = (SpikeGuard(3.0, CPU) for _ in range(3))
    expected = judged(whole, losses, norms)
    flags = judged(first, losses[:middle], norms[:middle])
    torch.save(first.state_dict(), tmp_path / "guard.pt")
    second.load_state_dict(torch.load(tmp_path / "guard.pt", weights_only=True))
    flags += judged(second, losses[middle:], norms[middle:])
    assert flags == expected
    assert (second.skipped, second.skipped_in_a_row) == (whole.skipped, whole.skipped_in_a_row)
