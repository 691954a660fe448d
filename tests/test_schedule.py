"""The learning rate at chosen steps, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sinktrain.errors import ConfigError
from sinktrain.training.schedule import Schedule


def schedule(**changes: Any) -> Schedule:
    settings: dict[str, Any] = {
        "kind": "cosine",
        "peak": 1.0,
        "min_ratio": 0.1,
        "warmup_steps": None,
        "decay_steps": None,
        "max_steps": 1000,
    }
    return Schedule(**settings | changes)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 11),
        (4, 5 / 11),
        (9, 10 / 11),
        (10, 1.0),  # the first step after 1% of warm-up
        (505, 0.55),  # half way
        (1000, 0.1),
        (5000, 0.1),  # never below
    ],
)
def test_cosine_as_pythia_has_it(step: int, expected: float) -> None:
    assert schedule().learning_rate(step) == pytest.approx(expected, abs=1e-12)


def test_cosine_at_a_third() -> None:
    expected = 6e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert schedule(peak=6e-4, warmup_steps=100).learning_rate(400) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1 / 11), (10, 1.0), (799, 1.0), (800, 1.0), (900, 0.55), (999, 0.1045), (1000, 0.1)],
)
def test_wsd_is_constant_then_linear(step: int, expected: float) -> None:
    assert schedule(kind="wsd").learning_rate(step) == pytest.approx(expected, abs=1e-12)


def test_wsd_decays_over_the_given_steps() -> None:
    wsd = schedule(kind="wsd", decay_steps=10, min_ratio=0.0)
    assert [wsd.learning_rate(step) for step in (989, 990, 995)] == pytest.approx([1.0, 1.0, 0.5])


def test_wsd_trunk_does_not_depend_on_the_budget() -> None:
    """One trunk serves several budgets: a longer run has the same rates before its decay."""
    short, long = (schedule(kind="wsd", warmup_steps=10, max_steps=steps) for steps in (100, 1000))
    assert [short.learning_rate(step) for step in range(80)] == [
        long.learning_rate(step) for step in range(80)
    ]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert schedule(warmup_steps=0).learning_rate(0) == 1.0
    assert schedule(max_steps=1).learning_rate(0) == 1.0


def test_steps_that_are_missing_are_asked_for() -> None:
    with pytest.raises(
        ConfigError, match=r"^trainer.max_steps is -1; say how many optimizer steps to train$"
    ):
        schedule(max_steps=-1)


def test_warm_up_that_never_ends_is_refused() -> None:
    message = r"^model.warmup_steps is 20 of trainer.max_steps 20; use fewer warm-up steps$"
    with pytest.raises(ConfigError, match=message):
        schedule(warmup_steps=20, max_steps=20)


@pytest.mark.parametrize("changes", [{"warmup_steps": -1}, {"decay_steps": -5, "kind": "wsd"}])
def test_negative_steps_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be 0 or more$"):
        schedule(**changes)


def test_wsd_decay_that_overlaps_the_warm_up_is_refused() -> None:
    message = (
        r"^model.warmup_steps 30 and model.decay_steps 80 exceed trainer.max_steps 100; use fewer of them$"
    )
    with pytest.raises(ConfigError, match=message):
        schedule(kind="wsd", warmup_steps=30, decay_steps=80, max_steps=100)
