"""Habits of every test, and the fixtures that several files share."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sinktrain.cli import share_cores

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
share_cores()  # before torch is imported

import pytest
import torch
from tiny_shards import tiny_run, write_shards

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
torch.set_num_threads(1)  # the models are tiny, and other processes may share the cores


def pytest_collection_finish() -> None:
    """What is there before the first test stays, so no collection of garbage has to go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _triton_is_patched_once_a_launch() -> None:
    """Triton's interpreter replaces what is in ``triton.language`` for the time of a kernel's launch, and
    does so anew for each function that the kernel calls, to no effect. That took a third of their time.
    """
    if "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        is_patched = not any(language.core.is_builtin(part.load) for part in (language, language.core))
        return interpreter._LangPatchScope() if is_patched else patch_language(function)

    interpreter._patch_lang = patch_once


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small real shards, not to be changed."""
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
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, as ``train`` makes it, that nothing happened to; not to be changed."""
    from sinktrain.training.fit import fit

    run = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(tiny_run(shards, run))
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
