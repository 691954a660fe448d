"""Habits of every test, and the fixtures that several files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sinktrain.cli import share_cores

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
share_cores()  # before torch is imported

import pytest
import torch
from tiny_shards import tiny_run, write_shards

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
torch.set_num_threads(1)  # the models are tiny, and other processes may share the cores


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small real shards, alike in every module."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs ``sinktrain fit`` in this process, for 12 tiny steps, and gives its run folder."""
    from sinktrain.training.fit import fit  # takes seconds to import, which other tests are spared

    def run(name: str = "run", *options: str) -> Path:
        fit(tiny_run(shards, tmp_path / name, *options))
        return tmp_path / name

    return run


@pytest.fixture
def train_for(train: Callable[..., Path]) -> Callable[..., Path]:
    """``train`` for so many steps, which are the same in a longer run."""
    from two_processes import CONSTANT

    def run(name: str, max_steps: int, *options: str) -> Path:
        return train(name, *CONSTANT, "--trainer.max_steps", str(max_steps), *options)

    return run


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, as ``train_for`` makes it; every fourth is kept."""
    from two_processes import CONSTANT

    from sinktrain.training.fit import fit

    run = tmp_path_factory.mktemp("one") / "run"
    fit(tiny_run(shards, run, *CONSTANT, "--checkpoint.keep", "null"))
    return run


@pytest.fixture
def alone_again() -> Iterator[None]:
    """Leaves nothing of a process group to other tests."""
    environment = dict(os.environ)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)
