"""Eight processes on the CPU (gloo) train what one process trains, on any way there, and outlive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_companions import ended
from tiny_shards import start, tiny_run
from two_processes import CONSTANT, assert_close, processes_of

from sinktrain.training.companions import Process
from sinktrain.training.fit import fit

pytestmark = pytest.mark.slow  # eight processes import lightning, on as many cores as there are

both_strategies = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
STEPS = 50
SETTINGS = [
    *("--config", "sink"),
    *("--data.global_batch", "16"),
    *("--model.network.intermediate_size", "9"),  # under FSDP2 ranks 5 to 7 have none of its rows
    *CONSTANT,
]


# -- what happens in the processes ----------------------------------------------------------------


class Notes(Callback):
    """Notes a hash of each window that a rank trains on."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: torch.Tensor, batch_idx: int
    ) -> None:
        hashes = " ".join(sha256(window.numpy().tobytes()).hexdigest() for window in batch)
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {trainer.global_rank} {hashes}\n")


class Hold(Callback):
    """Has a rank stand still at a moment of a step, until it is killed, and say so by a file.

    Args:
        ready: the file; made when the rank stands still.
        moment: ``step`` (before its backward pass), ``save`` (weights are gathered, the optimizer's state is
            not) or ``write`` (half of the file is on disk; only rank 0 writes).
        rank: who.
        step: how many steps have been taken by then.
    """

    def __init__(self, ready: str, moment: str, rank: int, step: int) -> None:
        self.ready = Path(ready)
        self.moment = moment
        self.rank = rank
        self.step = step

    def hold(self, moment: str, rank: int, step: int) -> None:
        if (moment, rank, step) == (self.moment, self.rank, self.step):
            self.ready.touch()
            time.sleep(600)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self.hold("step", trainer.global_rank, trainer.global_step)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        real_state, real_save = strategy.optimizer_state, torch.save

        def optimizer_state(optimizer: torch.optim.Optimizer) -> Any:
            self.hold("save", trainer.global_rank, trainer.global_step)
            return real_state(optimizer)

        def save(state: dict[str, Any], file: Any) -> None:
            real_save(state, file)
            if self.moment == "write" and state["global_step"] == self.step:
                file.truncate(file.tell() // 2)
                self.hold("write", trainer.global_rank, self.step)

        strategy.optimizer_state = optimizer_state
        torch.save = save


# -- what tests do with them ----------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _processes_find_the_callbacks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
        yield


def arguments(shards: Path, run: Path, *options: str) -> list[str]:
    notes = ["--trainer.callbacks+=test_eight_processes.Notes", f"--trainer.callbacks.path={run}.notes"]
    return tiny_run(shards, run, *SETTINGS, "--trainer.max_steps", str(STEPS), *notes, *options)


def on(processes: int, strategy: str) -> list[str]:
    return ["--config", strategy, "--trainer.devices", str(processes), "--data.micro_batch", "1"]


def finish(arguments: list[str]) -> str:
    """Run ``sinktrain fit`` to its end; returns what it told."""
    process = start(arguments)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def global_batches(run: Path) -> list[list[str]]:
    """Hashes of the windows of each step, in the order of ranks."""
    noted: dict[int, dict[int, list[str]]] = {}
    for line in Path(f"{run}.notes").read_text().splitlines():
        step, rank, *hashes = line.split()
        noted.setdefault(int(step), {})[int(rank)] = hashes
    assert sorted(noted) == list(range(STEPS))
    return [[one for _, hashes in sorted(noted[step].items()) for one in hashes] for step in range(STEPS)]


@pytest.fixture(scope="module")
def one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps on one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    fit(arguments(shards, run))
    return run


@pytest.fixture(scope="module")
def eight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """All steps on eight processes that nothing happens to, by strategy."""

    @cache
    def run(strategy: str) -> Path:
        path = tmp_path_factory.mktemp(strategy) / "run"
        finish(arguments(shards, path, *on(8, strategy)))
        return path

    return run


def kill(rank: int, process: subprocess.Popen[str], ready: Path) -> tuple[int, float]:
    """Kill that rank once it stands still; returns its pid and after how many seconds all eight had ended."""
    while not ready.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    ranks = [Process.of(pid) for pid in processes_of(process.pid)]
    alive = [fellow for fellow in ranks if fellow is not None]
    assert len(alive) == 8
    killed_at = time.monotonic()
    os.kill(alive[rank].pid, signal.SIGKILL)
    is_over = ended([fellow.pid for fellow in alive], within_s=60)
    ended_s = time.monotonic() - killed_at
    for fellow in alive:
        if fellow.is_alive:
            os.kill(fellow.pid, signal.SIGKILL)
    assert is_over, "a rank lives on, a minute after another was killed"
    return alive[rank].pid, ended_s


# -- the tests ------------------------------------------------------------------------------------


@both_strategies
def test_eight_processes_equal_one_over_fifty_steps(
    strategy: str, one: Path, eight: Callable[[str], Path]
) -> None:
    assert global_batches(eight(strategy)) == global_batches(one)
    assert_close(one, eight(strategy))


@both_strategies
def test_eight_processes_then_four_then_eight_equal_one(
    strategy: str, one: Path, shards: Path, tmp_path: Path
) -> None:
    for processes, last in ((8, 16), (4, 32), (8, STEPS)):
        steps = ["--trainer.max_steps", str(last)]
        told = finish(arguments(shards, tmp_path / "parts", *on(processes, strategy), *steps))
        assert told.count(f"finished at step {last}") == 1, told
    assert global_batches(tmp_path / "parts") == global_batches(one)
    assert_close(one, tmp_path / "parts")


@pytest.mark.parametrize(
    ("strategy", "moment", "rank", "step"),
    [("ddp", "step", 5, 10), ("ddp", "write", 0, 12), ("fsdp", "save", 3, 12)],
)
def test_a_killed_rank_ends_all_eight_and_the_run_continues_as_if_undisturbed(
    strategy: str,
    moment: str,
    rank: int,
    step: int,
    eight: Callable[[str], Path],
    shards: Path,
    tmp_path: Path,
) -> None:
    run, ready = tmp_path / "parts", tmp_path / "ready"
    same = arguments(shards, run, *on(8, strategy))
    given = {"ready": ready, "moment": moment, "rank": rank, "step": step}
    hold = [f"--trainer.callbacks.{name}={value}" for name, value in given.items()]
    process = start([*same, "--trainer.callbacks+=test_eight_processes.Hold", *hold])
    pid, ended_s = kill(rank, process, ready)
    print(f"all had ended {ended_s:.1f} s after the kill")
    told = process.communicate(timeout=60)[1]
    said = f"rank {rank} (pid {pid}) has died; the same command continues from step-00000008"
    assert [line for line in told.splitlines() if " died" in line] == [f"sinktrain fit: {said}"], told
    assert (run / "checkpoints" / ".step-00000012.ckpt.tmp").exists() == (moment == "write")
    assert finish(same).count("from step-00000008.ckpt") == 1
    assert global_batches(run) == global_batches(eight(strategy))
    assert_close(eight(strategy), run)
