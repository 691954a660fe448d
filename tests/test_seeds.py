"""Differences over seeds: which arms and rows are compared, by which test, in which order."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from sinktrain.evaluation.seeds import arm_rows, seed_rows

Row = dict[str, Any]
SETTINGS = [("streaming", 0, 16), ("streaming", 1, 15), ("streaming", 2, 14), ("dense", 0, 40)]


def model(arm: str | None, seed: int | None, sinks: int = 0, **facts: Any) -> Row:
    sink = {"kind": "token" if sinks else "none", "count": sinks, "token_ids": list(range(sinks))}
    return {
        "name": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "sink": sink,
        "parameters": 1000,
        "trained_length": 32,
        "tokenizer": "f00d",
        "tokens_seen": 6400,
        **facts,
    }


def rows(name: str, losses: list[float], settings: list[tuple[str, int, int]] = SETTINGS) -> list[Row]:
    return [
        {
            "model": name,
            "text": "book",
            "policy": policy,
            "sinks": sinks,
            "window": window,
            "loss_nats": loss,
        }
        for (policy, sinks, window), loss in zip(settings, losses, strict=True)
    ]


def measured(*arms: tuple[str, int, int]) -> tuple[list[Row], list[Row]]:
    """Models (arm, seed, sinks) whose losses are all different, each seed's own."""
    models = [model(*arm) for arm in arms]
    perplexity: list[Row] = []
    for number, one in enumerate(models):
        perplexity += rows(one["name"], [3 + 0.1 * k + 0.01 * number**1.5 for k in range(len(SETTINGS))])
    return models, perplexity


def loss(perplexity: list[Row], name: str, *setting: Any) -> float:
    wanted = dict(zip(("model", "policy", "sinks", "window"), (name, *setting), strict=True))
    [found] = [row["loss_nats"] for row in perplexity if wanted.items() <= row.items()]
    return float(found)


VANILLA, SINK = [("vanilla", seed, 0) for seed in (1, 2, 3)], [("sink", seed, 1) for seed in (1, 2, 3)]


def test_arms_of_the_same_seeds_are_paired_by_seed_later_minus_earlier() -> None:
    models, perplexity = measured(*VANILLA, *SINK)
    between = [row for row in seed_rows(models, perplexity) if row["a"] != row["b"]]
    assert [(row["policy"], row["sinks"], row["window"]) for row in between] == SETTINGS
    for row in between:
        setting = row["policy"], row["sinks"], row["window"]
        deltas = [
            loss(perplexity, f"sink-{seed}", *setting) - loss(perplexity, f"vanilla-{seed}", *setting)
            for seed in (1, 2, 3)
        ]
        assert (row["a"], row["b"], row["interval"], row["num_seeds"]) == ("sink", "vanilla", "seeds", 3)
        assert row["text"] == "book"
        assert row["deltas"] == pytest.approx(deltas)
        expected = stats.ttest_1samp(deltas, 0.0)
        assert row["p"] == pytest.approx(expected.pvalue)
        assert row["ci95"] == pytest.approx(list(expected.confidence_interval(0.95)))
        assert row["delta_nats"] == pytest.approx(sum(deltas) / 3)


def test_pairing_goes_by_seed_in_whatever_order_models_are_named() -> None:
    models, perplexity = measured(*VANILLA, *SINK)
    shuffled = [models[i] for i in (2, 0, 1, 4, 5, 3)]
    assert seed_rows(shuffled, perplexity) == seed_rows(models, perplexity)


def test_arms_of_other_seeds_are_compared_by_welch() -> None:
    models, perplexity = measured(*VANILLA, ("sink", 3, 1), ("sink", 4, 1))
    row = next(row for row in seed_rows(models, perplexity) if row["a"] != row["b"])
    losses = [
        [loss(perplexity, f"{arm}-{seed}", *SETTINGS[0]) for seed in seeds]
        for arm, seeds in (("sink", (3, 4)), ("vanilla", (1, 2, 3)))
    ]
    expected = stats.ttest_ind(*losses, equal_var=False)
    assert (row["num_seeds"], row["deltas"], row["interval"]) == (2, [], "seeds")
    assert row["p"] == pytest.approx(expected.pvalue)
    assert row["ci95"] == pytest.approx(list(expected.confidence_interval(0.95)))


def test_each_arms_layouts_are_compared_with_the_one_it_needs_of_the_same_length() -> None:
    settings = [("streaming", s, n - s) for n in (16, 8) for s in (0, 1, 2)] + [("streaming", 0, 4)]
    models = [model("two", seed, sinks=2) for seed in (1, 2)]
    losses = [[3.0, 2.9, 2.5, 4.0, 3.9, 3.5, 5.0], [3.3, 2.9, 2.5, 4.4, 3.8, 3.5, 5.0]]
    perplexity = [
        row for one, some in zip(models, losses, strict=True) for row in rows(one["name"], some, settings)
    ]
    layouts = [
        (row["a_sinks"], row["a_window"], row["b_sinks"], row["b_window"], row["deltas"])
        for row in seed_rows(models, perplexity)
    ]
    assert layouts == [
        (0, 16, 2, 14, pytest.approx([0.5, 0.8])),
        (1, 15, 2, 14, pytest.approx([0.4, 0.4])),
        (0, 8, 2, 6, pytest.approx([0.5, 0.9])),
        (1, 7, 2, 6, pytest.approx([0.4, 0.3])),
    ]
    first = seed_rows(models, perplexity)[0]
    assert (first["a"], first["b"], first["sinks"], first["window"]) == ("two", "two", 0, 16)


def test_vanilla_layouts_are_compared_with_one_kept_token() -> None:
    models, perplexity = measured(*VANILLA)
    found = [
        (row["a_sinks"], row["b_sinks"], row["policy"], row["num_seeds"])
        for row in seed_rows(models, perplexity)
    ]
    assert found == [(0, 1, "streaming", 3), (2, 1, "streaming", 3)]


def test_dense_and_recomputed_rows_belong_together_though_sinks_lengthen_them() -> None:
    vanilla, sink = [("dense", 0, 40), ("recompute", 0, 16)], [("dense", 0, 41), ("recompute", 1, 15)]
    models = [model(arm, seed, sinks) for arm, sinks in (("vanilla", 0), ("sink", 1)) for seed in (1, 2)]
    perplexity = [
        row
        for number, one in enumerate(models)
        for row in rows(one["name"], [3.0 + number, 4.0 + number], sink if one["sink"]["count"] else vanilla)
    ]
    found = [(row["policy"], row["sinks"], row["window"]) for row in seed_rows(models, perplexity)]
    assert found == sink


def test_recomputed_rows_of_other_lengths_are_other_rows() -> None:
    models = [model(arm, seed) for arm in ("a", "b") for seed in (1, 2)]
    perplexity = [
        row
        for one in models
        for row in rows(one["name"], [3.0], [("recompute", 0, 16 if one["arm"] == "a" else 8)])
    ]
    assert seed_rows(models, perplexity) == []


def test_only_rows_that_every_seed_has_are_compared_and_texts_stay_apart() -> None:
    models, perplexity = measured(*VANILLA, *SINK)
    other = [row | {"text": "plays", "loss_nats": row["loss_nats"] + 1} for row in perplexity]
    missing = [row for row in other if not (row["model"] == "sink-2" and row["sinks"] == 0)]
    found = seed_rows(models, [*perplexity, *missing])
    between = [(row["text"], row["policy"], row["sinks"]) for row in found if row["a"] != row["b"]]
    assert between == [
        ("book", "streaming", 0),
        ("book", "streaming", 1),
        ("book", "streaming", 2),
        ("book", "dense", 0),
        ("plays", "streaming", 1),
        ("plays", "streaming", 2),
    ]
    of_sink = [(row["text"], row["a_sinks"]) for row in found if row["a"] == row["b"] == "sink"]
    assert of_sink == [("book", 0), ("book", 2), ("plays", 2)]


def test_three_arms_give_every_two() -> None:
    models, perplexity = measured(*VANILLA, *SINK, ("zero", 1, 0), ("zero", 2, 0), ("zero", 3, 0))
    pairs = dict.fromkeys((r["a"], r["b"]) for r in seed_rows(models, perplexity) if r["a"] != r["b"])
    assert list(pairs) == [("sink", "vanilla"), ("zero", "vanilla"), ("zero", "sink")]


def test_an_arms_rows_are_over_its_seeds_and_an_arm_of_one_seed_has_none() -> None:
    models, perplexity = measured(*VANILLA, *SINK, ("lonely", 1, 0))
    found = arm_rows(models, perplexity)
    assert {row["arm"] for row in found} == {"vanilla", "sink"}
    assert len(found) == 2 * len(SETTINGS)
    row = next(row for row in found if row["arm"] == "sink" and row["sinks"] == 1)
    losses = [loss(perplexity, f"sink-{seed}", "streaming", 1, 15) for seed in (1, 2, 3)]
    error, quantile = stats.sem(losses), stats.t(2).ppf(0.975)
    assert (row["num_seeds"], row["policy"], row["window"]) == (3, "streaming", 15)
    assert row["loss_nats"] == pytest.approx(sum(losses) / 3)
    assert row["deviation_nats"] == pytest.approx(3**0.5 * error)
    assert row["ci95"][1] - row["loss_nats"] == pytest.approx(quantile * error)
    assert row["prediction95"][1] - row["loss_nats"] == pytest.approx(quantile * 2 * error)


@pytest.mark.parametrize(
    "sinks",
    [
        pytest.param([model("sink", 1, 1)], id="one seed"),
        pytest.param([model("sink", None, 1), model("sink", None, 1)], id="no seed"),
        pytest.param([model(None, 1, 1), model(None, 2, 1)], id="no arm"),
        pytest.param(
            [model("sink", 1, 1), model("sink", 1, 1, name="step-100"), model("sink", 2, 1)],
            id="a seed twice",
        ),
        pytest.param([model("sink", 1, 1), model("sink", 2, 1, tokens_seen=3200)], id="stopped half-way"),
        pytest.param([model("sink", 1, 1), model("sink", 2, 1, parameters=9)], id="other sizes"),
        pytest.param([model("sink", 1, 1), model("sink", 2, 2)], id="other sinks"),
    ],
)
def test_an_arm_whose_models_are_not_seeds_of_one_training_is_left_out(sinks: list[Row]) -> None:
    models, perplexity = measured(*VANILLA)
    for one in sinks:
        perplexity += rows(one["name"], [2.0, 2.1, 2.2, 2.3])
    found = seed_rows([*models, *sinks], perplexity)
    assert found == seed_rows(models, perplexity) != []


def test_arms_of_other_tokenizers_are_not_compared() -> None:
    models, perplexity = measured(*VANILLA, *SINK)
    models = [one | ({"tokenizer": "beef"} if one["arm"] == "sink" else {}) for one in models]
    assert {(row["a"], row["b"]) for row in seed_rows(models, perplexity)} == {
        ("vanilla", "vanilla"),
        ("sink", "sink"),
    }
