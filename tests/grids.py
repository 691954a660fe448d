"""Grids of cases, all of which are slow tests, and some of which are default ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def thinned(*axes: Sequence[Any], times: int = 1) -> list[ParameterSet]:
    """Every combination, with slow marks but for the default tests: in them each value occurs.

    Args:
        axes: values of one argument of the test each, or tuples of several arguments' values.
        times: with how many of the other axes' values each value of the longest axis occurs by default.
    """
    longest = max(map(len, axes))
    chosen = {
        tuple((number + turn * place) % len(axis) for place, axis in enumerate(axes))
        for number in range(longest)
        for turn in range(times)
    }
    return [
        _case([axis[at] for axis, at in zip(axes, places, strict=True)], places in chosen)
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]


def by_default(default: Sequence[Any], *, slow: Sequence[Any]) -> list[ParameterSet]:
    """These by default, and those in slow tests: values as for ``thinned``."""
    return [*(_case([value], True) for value in default), *(_case([value], False) for value in slow)]


def _case(values: Sequence[Any], is_default: bool) -> ParameterSet:
    spread = [part for value in values for part in (value if type(value) is tuple else (value,))]
    marks = () if is_default else pytest.mark.slow
    return pytest.param(
        *spread, marks=marks, id="-".join(getattr(part, "__name__", str(part)) for part in spread)
    )
