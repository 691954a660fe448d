"""Differences over training seeds: between arms, and between the layouts of one arm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sinktrain.evaluation.statistics import Difference, mean_of_seeds, t_difference, welch_difference
from sinktrain.streaming.layout import VANILLA_SINKS

Row = dict[str, Any]
Key = tuple[Any, ...]

SAME_IN_AN_ARM = ("sink", "parameters", "trained_length", "tokenizer", "tokens_seen")


@dataclass(frozen=True)
class _Arm:
    """An arm's rows of ``perplexity[]`` by seed, in the order of seeds; under each, by text and setting."""

    name: str
    num_sinks: int
    tokenizer: str | None
    by_seed: dict[int, dict[Key, Row]]

    @property
    def needed_sinks(self) -> int:
        return max(1, self.num_sinks)

    @property
    def usual_sinks(self) -> int:
        return self.num_sinks or VANILLA_SINKS

    @property
    def shared_rows(self) -> dict[Key, Row]:
        """Of the first seed, the rows that every seed has."""
        first, *others = self.by_seed.values()
        return {key: row for key, row in first.items() if all(key in other for other in others)}

    def losses(self, key: Key) -> list[float]:
        """One per seed, nats."""
        return [float(rows[key]["loss_nats"]) for rows in self.by_seed.values()]


def seed_rows(models: Sequence[Row], perplexity: Sequence[Row]) -> list[Row]:
    """The rows of ``paired[]`` whose intervals are over seeds; ``a`` and ``b`` are arms.

    Later arms against earlier ones, in the same setting and each in its usual layout, and each arm's
    layouts against the one of the same N that keeps as many slots as it has sinks, or one. Where two arms
    have the same seeds they are paired by seed, which shares the order of the data and the initial weights,
    and ``deltas`` holds the seeds' differences in the order of the seeds. Otherwise the test is Welch's,
    ``deltas`` is empty, and ``num_seeds`` counts the seeds of the arm that has fewer.

    Left out are models without an arm or a seed, arms of one seed, and arms whose models differ in more
    than their seed or have a seed twice (several checkpoints of a run, say): they spread for other reasons.

    Args:
        models: ``models[]`` of results.json.
        perplexity: ``perplexity[]``.
    """
    arms = _arms(models, perplexity)
    return [*_between_arms(arms), *_between_layouts(arms)]


def arm_rows(models: Sequence[Row], perplexity: Sequence[Row]) -> list[Row]:
    """Each arm's losses over its seeds: ``arms[]`` of results.json.

    Left out are the models that ``seed_rows`` leaves out.

    Args:
        models: ``models[]`` of results.json.
        perplexity: ``perplexity[]``.
    """
    return [
        _arm_row(arm, key, row) for arm in _arms(models, perplexity) for key, row in arm.shared_rows.items()
    ]


def _arm_row(arm: _Arm, key: Key, setting: Row) -> Row:
    over = mean_of_seeds(arm.losses(key))
    return {
        "arm": arm.name,
        **{name: setting[name] for name in ("text", "policy", "sinks", "window")},
        "num_seeds": len(arm.by_seed),
        "loss_nats": over.mean,
        "deviation_nats": over.deviation,
        "ci95": list(over.interval),
        "prediction95": list(over.prediction),
    }


def _arms(models: Sequence[Row], perplexity: Sequence[Row]) -> list[_Arm]:
    members: dict[str, list[Row]] = {}
    for model in models:
        if model["arm"] is not None and model["seed"] is not None:
            members.setdefault(model["arm"], []).append(model)
    return [_arm(name, some, perplexity) for name, some in members.items() if _differ_in_seed_alone(some)]


def _differ_in_seed_alone(models: Sequence[Row]) -> bool:
    num_seeds = len({model["seed"] for model in models})
    first = models[0]
    alike = all(model[fact] == first[fact] for model in models for fact in SAME_IN_AN_ARM)
    return alike and len(models) == num_seeds >= 2


def _arm(name: str, models: Sequence[Row], perplexity: Sequence[Row]) -> _Arm:
    by_seed = {
        model["seed"]: {_key(row): row for row in perplexity if row["model"] == model["name"]}
        for model in sorted(models, key=lambda model: int(model["seed"]))
    }
    return _Arm(name, models[0]["sink"]["count"], models[0]["tokenizer"], by_seed)


def _key(row: Row) -> Key:
    """What tells rows of a model apart, alike for models whose streams or windows hold other sinks."""
    if row["policy"] == "dense":
        return row["text"], row["policy"]
    if row["policy"] == "recompute":
        return row["text"], row["policy"], row["sinks"] + row["window"]
    return row["text"], row["policy"], row["sinks"], row["window"]


def _between_arms(arms: list[_Arm]) -> Iterator[Row]:
    for b, a in itertools.combinations(arms, 2):
        if a.tokenizer != b.tokenizer:
            continue
        for key in a.shared_rows:
            if key in b.shared_rows:
                yield _over_seeds(a, key, b, key)
        for key, row in a.shared_rows.items():
            others = row | {"sinks": b.usual_sinks, "window": row["sinks"] + row["window"] - b.usual_sinks}
            is_usual = row["policy"] == "streaming" and row["sinks"] == a.usual_sinks
            if is_usual and a.usual_sinks != b.usual_sinks and _key(others) in b.shared_rows:
                yield _over_seeds(a, key, b, _key(others)) | _layouts(row, others)


def _between_layouts(arms: list[_Arm]) -> Iterator[Row]:
    for arm in arms:
        for key, row in arm.shared_rows.items():
            num_slots = row["sinks"] + row["window"]
            reference = row | {"sinks": arm.needed_sinks, "window": num_slots - arm.needed_sinks}
            if row["policy"] != "streaming" or row == reference or _key(reference) not in arm.shared_rows:
                continue
            yield _over_seeds(arm, key, arm, _key(reference)) | _layouts(row, reference)


def _layouts(a: Row, b: Row) -> Row:
    return {"a_sinks": a["sinks"], "a_window": a["window"], "b_sinks": b["sinks"], "b_window": b["window"]}


def _over_seeds(a: _Arm, a_key: Key, b: _Arm, b_key: Key) -> Row:
    """Paired by seed where both arms have the same seeds, otherwise Welch's."""
    row, a_losses, b_losses = a.shared_rows[a_key], a.losses(a_key), b.losses(b_key)
    if a.by_seed.keys() != b.by_seed.keys():
        num_seeds = min(len(a_losses), len(b_losses))
        return _row(a, b, row, welch_difference(a_losses, b_losses), num_seeds, [])
    deltas = [x - y for x, y in zip(a_losses, b_losses, strict=True)]
    return _row(a, b, row, t_difference(deltas), len(deltas), deltas)


def _row(a: _Arm, b: _Arm, setting: Row, difference: Difference, num_seeds: int, deltas: list[float]) -> Row:
    return {
        "a": a.name,
        "b": b.name,
        "text": setting["text"],
        "policy": setting["policy"],
        "sinks": setting["sinks"],
        "window": setting["window"],
        "delta_nats": difference.delta_nats,
        "ci95": [difference.low, difference.high],
        "p": difference.p,
        "interval": "seeds",
        "num_seeds": num_seeds,
        "deltas": deltas,
    }
