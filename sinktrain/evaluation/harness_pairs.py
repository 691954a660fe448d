"""Differences between models on tasks of lm-evaluation-harness, paired example by example."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Row = dict[str, Any]


def paired_rows(scores: Sequence[Row]) -> list[Row]:
    """Later models less earlier ones, example by example, where a metric is a mean of such shares.

    Args:
        scores: rows of ``example_scores``, with their models.
    """
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in scores:  # a task may be asked for by its own name and by its group's
        groups.setdefault((row["task"], row["metric"]), {})[row["model"]] = row
    rows = []
    for (task, metric), group in groups.items():
        for b, a in itertools.combinations(group.values(), 2):
            deltas = np.array(a["scores"]) - np.array(b["scores"])
            low, high, p = paired_interval(deltas)
            rows.append(
                {
                    "a": a["model"],
                    "b": b["model"],
                    "task": task,
                    "metric": metric,
                    "delta": float(deltas.mean()),
                    "ci95": [low, high],
                    "p": p,
                    "num_examples": len(deltas),
                    "interval": "examples",
                }
            )
    return rows


def paired_interval(deltas: NDArray[np.float64]) -> tuple[float, float, float]:
    """95% interval and two-sided p-value of a mean difference over independent examples.

    Wald's for matched pairs after half an example is added to each of the four cells (right or wrong by
    either model), which holds its level at any size, also where the models never differ. Interval and p are
    one statement.

    Args:
        deltas: float64[example], each from -1 to 1.

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24 (2005).
    """
    count = len(deltas) + 2
    mean = float(deltas.sum()) / count
    error = math.sqrt(((float(deltas @ deltas) + 1) / count - mean**2) / count)
    reach = float(ndtri(0.975)) * error
    return max(-1.0, mean - reach), min(1.0, mean + reach), float(2 * ndtr(-abs(mean) / error))
