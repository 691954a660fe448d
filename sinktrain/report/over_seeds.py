"""A mean over seeds with its interval, as the cell of a table; apart, for it takes numpy and scipy."""

from __future__ import annotations

from collections.abc import Sequence

from sinktrain.evaluation.statistics import mean_of_seeds


def over_seeds_text(values: Sequence[float], form: str) -> str:
    """``2.996 ± 0.003``: the mean of several seeds and half of its 95% interval; of one seed, its value.

    Args:
        values: one per seed; of none, nothing is told.
        form: as ``format`` has it, of both.
    """
    if not values:
        return ""
    if len(values) == 1:
        return format(values[0], form)
    over = mean_of_seeds(values)
    low, high = over.interval
    return f"{over.mean:{form}} ± {(high - low) / 2:{form}}"
