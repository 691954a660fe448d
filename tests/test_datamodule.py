"""Batches: the same sequence whatever the world size, the micro-batch and the point of resumption."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_shards import SEQ_LEN, write_shards

from sinktrain.data.datamodule import WindowData, WindowLoader
from sinktrain.data.shards import TokenSplit
from sinktrain.data.windows import permute
from sinktrain.errors import ConfigError, DataError

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 3
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


def data(shards: Path, rank: int = 0, world_size: int = 1, step: int = 0, **settings: Any) -> WindowData:
    """The data of one rank in a run that is at ``step``."""
    module = WindowData(
        str(shards), **{"seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "seed": 7} | settings
    )
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=world_size, global_step=step)
    module.trainer = trainer
    return module


def batches(module: WindowData, count: int) -> list[torch.Tensor]:
    loader = module.train_dataloader()
    taken = list(islice(loader, count))
    module.teardown("fit")
    return taken


def global_batches(
    shards: Path, world_size: int, count: int, state: Any = None, **settings: Any
) -> list[torch.Tensor]:
    """What all ranks read together, step by step."""
    ranks = []
    for rank in range(world_size):
        module = data(shards, rank, world_size, **settings)
        if state is not None:
            module.load_state_dict(state)
            module.trainer.global_step = state["global_step"]  # type: ignore[union-attr, misc]
        ranks.append(batches(module, count))
    return [torch.cat(parts) for parts in zip(*ranks, strict=True)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_the_permuted_windows_of_the_corpus(shards: Path) -> None:
    tokens = TokenSplit.open(shards, "train")
    total = (tokens.num_tokens - 1) // SEQ_LEN
    corpus = tokens.read(np.array([0]), tokens.num_tokens)[0]
    epoch = permute(np.arange(total), total, (7, 0))
    for step, batch in enumerate(global_batches(shards, 1, 5)):
        assert batch.dtype == torch.int64
        for row, window in zip(batch, epoch[step * GLOBAL_BATCH :], strict=False):
            start = int(window) * SEQ_LEN
            assert row.tolist() == corpus[start : start + SEQ_LEN + 1].tolist()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_world_size_reads_the_same_sequence(world_size: int, shards: Path) -> None:
    steps = 25  # 200 samples of 93 windows: more than two epochs
    assert same(global_batches(shards, 1, steps), global_batches(shards, world_size, steps))


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_every_micro_batch_reads_the_same_sequence(micro_batch: int, shards: Path) -> None:
    assert same(global_batches(shards, 1, 5), global_batches(shards, 1, 5, micro_batch=micro_batch))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_sequence_goes_on_with_another_world_size_in_the_middle_of_an_epoch(
    before: int, after: int, shards: Path
) -> None:
    whole = global_batches(shards, 1, 20)
    first = data(shards, 0, before)
    first.trainer.global_step = 7  # type: ignore[union-attr, misc]
    state = first.state_dict()
    assert state["samples_consumed"] == 7 * GLOBAL_BATCH
    assert same(whole[7:], global_batches(shards, after, 13, state))


def test_sequence_goes_on_with_another_global_batch(shards: Path) -> None:
    """Nothing is read twice or skipped, though steps now hold another number of samples."""
    whole = torch.cat(global_batches(shards, 1, 10))
    first = data(shards, step=3)
    state = first.state_dict()
    second = data(shards, global_batch=4)
    second.load_state_dict(state)
    second.trainer.global_step = 3  # type: ignore[union-attr, misc]
    assert torch.equal(torch.cat(batches(second, 6)), whole[24:48])
    second.trainer.global_step = 9  # type: ignore[union-attr, misc]
    assert second.samples_consumed == 48
    assert second.state_dict()["samples_consumed"] == 48


def test_arms_read_the_same_windows(shards: Path) -> None:
    """Nothing in the data module knows of sinks but whether theirs is scored."""
    assert same(global_batches(shards, 1, 5), global_batches(shards, 1, 5, score_sink=False))


def test_seeds_read_in_another_order(shards: Path) -> None:
    assert not torch.equal(global_batches(shards, 1, 1)[0], global_batches(shards, 1, 1, seed=8)[0])


def test_another_corpus_is_refused(shards: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "other", seed=1)
    message = "other is not the corpus that this checkpoint was trained on; pass its shards, or --resume none"
    with pytest.raises(DataError, match=message):
        data(tmp_path / "other").load_state_dict(data(shards).state_dict())


def test_moved_shards_are_the_same_corpus(shards: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "twin")
    data(tmp_path / "twin").load_state_dict(data(shards).state_dict())


def test_another_seed_is_refused(shards: Path) -> None:
    message = r"^seed_everything is 8 but the checkpoint's data order has seed 7; pass --seed_everything 7$"
    with pytest.raises(ConfigError, match=message):
        data(shards, seed=8).load_state_dict(data(shards).state_dict())


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "unit"), [(1, 3, 3), (3, None, 3), (2, 3, 6), (16, None, 16), (1, 16, 16)]
)
def test_a_remainder_is_refused(world_size: int, micro_batch: int | None, unit: int, shards: Path) -> None:
    message = (
        f"^data.global_batch 8 does not divide into {world_size} devices "
        f"x micro-batches of {micro_batch or 1}; "
        f"use a multiple of {unit}$"
    )
    with pytest.raises(ConfigError, match=message):
        data(shards, world_size=world_size, micro_batch=micro_batch).train_dataloader()


@pytest.mark.parametrize("settings", [{"global_batch": 0}, {"micro_batch": 0}, {"global_batch": -8}])
def test_empty_batches_are_refused(settings: dict[str, int], shards: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data.global_batch -?\d and data.micro_batch .* must be 1 or more$"
    ):
        data(shards, **settings)


def test_no_held_out_window_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.val_windows is 0; use 1 or more, or null for all$"):
        data(shards, val_windows=0)


def test_a_sample_has_room_for_all_sinks(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.seq_len is 8; use more than 8, which sinks may take$"):
        data(shards, seq_len=8)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared shards here"):
        data(tmp_path / "nothing")


@pytest.mark.parametrize(("split", "seq_len"), [("train", 3000), ("val", 500)])
def test_a_split_shorter_than_a_sample_is_refused(split: str, seq_len: int, shards: Path) -> None:
    module = data(shards, seq_len=seq_len)
    message = (
        f"the {split} split holds {seq_len} tokens, less than one sample of data.seq_len {seq_len} \\+ 1; "
        "use a shorter seq_len or more text$"
    )
    with pytest.raises(DataError, match=message):
        module.train_dataloader() if split == "train" else module.val_dataloader()


def test_errors_of_the_reading_thread_reach_training(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = data(shards)
    loader = module.train_dataloader()
    real = loader.batch

    def batch(number: int) -> torch.Tensor:
        if number == 2:
            raise DataError("the disk is gone")
        return real(number)

    monkeypatch.setattr(loader, "batch", batch)
    iterator = iter(loader)
    assert len([next(iterator), next(iterator)]) == 2
    with pytest.raises(DataError, match="the disk is gone"):
        next(iterator)  # and the thread has ended, as the fixture checks without close()


def test_the_reading_thread_ends_after_an_exception_in_training(shards: Path) -> None:
    module = data(shards)
    next(iter(module.train_dataloader()))
    module.on_exception(RuntimeError())


def test_iterating_again_starts_again_and_ends_the_first_thread(shards: Path) -> None:
    loader = data(shards).train_dataloader()
    first = next(iter(loader))
    assert torch.equal(first, next(iter(loader)))
    loader.close()


def test_a_closed_loader_has_no_thread(shards: Path) -> None:
    """One that is in torch while Python shuts down aborts the process, though the run has finished."""
    before = threading.active_count()
    for _ in range(20):
        loader = data(shards).train_dataloader()
        next(iter(loader))
        assert threading.active_count() == before + 1
        loader.close()
        assert threading.active_count() == before


def test_waiting_is_counted(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = data(shards).train_dataloader()
    real = loader.batch
    monkeypatch.setattr(loader, "batch", lambda number: (time.sleep(0.05), real(number))[1])
    next(iter(loader))
    loader.close()
    assert 0.04 < loader.wait_s < 2


def test_reading_ahead_is_bounded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = data(shards).train_dataloader()
    assert isinstance(loader, WindowLoader)
    numbers: list[int] = []
    real = loader.batch
    monkeypatch.setattr(loader, "batch", lambda number: (numbers.append(number), real(number))[1])
    iterator = iter(loader)
    next(iterator)
    time.sleep(0.3)
    loader.close()
    assert len(numbers) <= 6


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_held_out_samples_come_once_each(world_size: int, micro_batch: int, shards: Path) -> None:
    tokens = TokenSplit.open(shards, "val")
    expected = [tokens.read(np.array([i * SEQ_LEN]), SEQ_LEN + 1)[0].tolist() for i in range(10)]
    found, lengths = [], set()
    for rank in range(world_size):
        module = data(
            shards,
            rank,
            world_size,
            val_windows=10,
            global_batch=micro_batch * world_size,
            micro_batch=micro_batch,
        )
        loader = module.val_dataloader()
        made = list(loader)
        lengths.add((len(loader), len(made)))
        assert {len(windows) for windows, _ in made} == {micro_batch}
        found += [row.tolist() for windows, is_real in made for row in windows[is_real]]
    assert len(lengths) == 1  # ranks that disagree would wait for each other for ever
    assert sorted(found) == sorted(expected)


def test_all_held_out_samples_when_null(shards: Path) -> None:
    counts = [
        sum(int(is_real.sum()) for _, is_real in data(shards, val_windows=most).val_dataloader())
        for most in (None, 10_000, 3)
    ]
    assert counts == [(500 - 1) // SEQ_LEN, (500 - 1) // SEQ_LEN, 3]
