"""Paired windows: the order is a permutation by arithmetic, and sinks shift nothing that arms compare."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinktrain.data.windows import (
    IGNORED,
    insert_sinks,
    num_windows,
    permute,
    shared_targets,
    window_order,
)

TOTALS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 97, 100, 255, 256, 257, 1000, 4096, 4097, 10_007]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("key", [(0, 0), (1234, 5)])
def test_permutation_is_a_bijection(total: int, key: tuple[int, int]) -> None:
    assert np.array_equal(np.sort(permute(np.arange(total), total, key)), np.arange(total))


def test_permutation_of_one_position_does_not_depend_on_its_company() -> None:
    whole = permute(np.arange(1000), 1000, (7, 0))
    assert [int(permute(np.array([i]), 1000, (7, 0))[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_permutation_of_a_billion_windows_stays_inside() -> None:
    total = 10**9 + 7
    positions = np.arange(0, total, total // 10_000)
    order = permute(positions, total, (1, 0))
    assert len(np.unique(order)) == len(positions)
    assert order.min() >= 0
    assert order.max() < total


def test_permutation_looks_like_chance() -> None:
    """Neighbours in the order are no neighbours in the corpus, and no place in the epoch favours a part."""
    total = 10_000
    order = permute(np.arange(total), total, (3, 0))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(total))[0, 1]) < 0.05
    assert (order == np.arange(total)).sum() < 10


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    epochs = [window_order(epoch * 100, 100, 100, seed=1) for epoch in range(3)]
    seeds = [window_order(0, 100, 100, seed=seed) for seed in (1, 2)]
    assert all(sorted(order) == list(range(100)) for order in epochs + seeds)
    assert len({tuple(order) for order in epochs}) == 3
    assert tuple(seeds[0]) != tuple(seeds[1])


@pytest.mark.parametrize(
    ("first", "count", "total"), [(0, 10, 7), (3, 40, 13), (0, 5, 1), (100, 1, 33), (5, 0, 7)]
)
def test_window_order_equals_one_sample_after_another(first: int, count: int, total: int) -> None:
    def slow(sample: int) -> int:
        epoch, position = divmod(sample, total)
        return int(permute(np.arange(total), total, (9, epoch))[position])

    expected = [slow(first + i) for i in range(count)]
    order = window_order(first, count, total, seed=9)
    assert order.dtype == np.int64
    assert order.tolist() == expected


def test_order_is_the_same_for_ever() -> None:
    """A change here breaks every run that would be resumed: the numbers are part of the format."""
    assert window_order(0, 10, 10, seed=1234).tolist() == [0, 2, 8, 9, 7, 4, 3, 6, 1, 5]


def test_windows_share_only_their_border_token() -> None:
    assert [num_windows(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9, 13)] == [0, 0, 0, 1, 1, 2, 3]


WINDOW = torch.tensor([[10, 11, 12, 13, 14]])


@pytest.mark.parametrize(
    ("sinks", "score_sink", "inputs", "targets"),
    [
        ([], True, [10, 11, 12, 13], [11, 12, 13, 14]),
        ([], False, [10, 11, 12, 13], [11, 12, 13, 14]),
        ([90], True, [90, 10, 11, 12], [10, 11, 12, 13]),
        ([90], False, [90, 10, 11, 12], [IGNORED, 11, 12, 13]),
        ([90, 91], True, [90, 91, 10, 11], [IGNORED, 10, 11, 12]),
        ([90, 91], False, [90, 91, 10, 11], [IGNORED, IGNORED, 11, 12]),
    ],
)
def test_inputs_and_targets_by_hand(
    sinks: list[int], score_sink: bool, inputs: list[int], targets: list[int]
) -> None:
    made = insert_sinks(WINDOW, torch.tensor(sinks, dtype=torch.int64), score_sink)
    assert [t.tolist() for t in made] == [[inputs], [targets]]
    assert all(t.dtype == torch.int64 for t in made)


def _windows(rows: int, seq_len: int) -> torch.Tensor:
    return torch.arange(rows * (seq_len + 1)).view(rows, seq_len + 1)


@pytest.mark.parametrize("num_sinks", [0, 1, 2, 8])
@pytest.mark.parametrize("score_sink", [True, False])
def test_all_arms_share_the_same_target_tokens(num_sinks: int, score_sink: bool) -> None:
    windows = _windows(3, 20)
    sinks = torch.arange(1000, 1000 + num_sinks)
    inputs, targets = insert_sinks(windows, sinks, score_sink)
    where = shared_targets(20, num_sinks)
    assert torch.equal(targets[:, where], windows[:, 1:13])
    assert torch.equal(inputs[:, where], windows[:, 0:12])  # each predicted from the token before it


def test_vanilla_windows_have_no_constant_first_token() -> None:
    inputs, _ = insert_sinks(_windows(5, 20), torch.tensor([], dtype=torch.int64))
    assert len(inputs[:, 0].unique()) == 5
