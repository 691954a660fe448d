"""Ranks that die, and what becomes of the others."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from test_distributed import TWO, processes_of
from tiny_shards import tiny_run, wait_for

from sinktrain.errors import TrainingError
from sinktrain.training import companions
from sinktrain.training.companions import Companions, Process, Watch, _check_same_start
from sinktrain.training.fit import fit
from sinktrain.training.saving import Checkpoints

# -- in this process ------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_process_that_was_killed_is_dead_before_anyone_waits_for_it(
    sleeper: subprocess.Popen[bytes],
) -> None:
    """A killed child is a zombie until its parent waits, and signals still reach it."""
    fellow = Process.of(sleeper.pid)
    assert fellow is not None
    assert fellow.is_alive
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # has ended, and stays a zombie
    os.kill(sleeper.pid, 0)
    assert not fellow.is_alive


def test_a_later_process_of_the_same_pid_is_another_one() -> None:
    mine = Process.of(os.getpid())
    assert mine is not None
    assert not Process(mine.pid, mine.started_at - 1).is_alive


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes of exits, which do not happen here; and seconds are shorter."""
    codes: list[int] = []
    monkeypatch.setattr(companions.os, "_exit", codes.append)
    monkeypatch.setattr(companions, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(companions, "GRACE_S", 0.2)
    return codes


def fellows(sleeper: subprocess.Popen[bytes]) -> dict[int, Process]:
    process = Process.of(sleeper.pid)
    assert process is not None
    return {1: process}


def test_a_death_is_told_with_what_continues(
    sleeper: subprocess.Popen[bytes], exits: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step-00000012.ckpt").touch()
    (tmp_path / "last.ckpt").symlink_to("step-00000012.ckpt")
    watch = Watch(0, fellows(sleeper), tmp_path)
    sleeper.kill()
    deadline = time.monotonic() + 20
    while not exits and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.close()
    assert exits == [1]
    assert capsys.readouterr().err == (
        f"sinktrain fit: rank 1 (pid {sleeper.pid}) has died; the same command continues from step-00000012\n"
    )


def test_a_fellow_that_ends_while_all_end_is_no_death(
    sleeper: subprocess.Popen[bytes], exits: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    watch = Watch(0, fellows(sleeper), tmp_path)
    sleeper.kill()
    time.sleep(0.05)
    watch.close()
    while threading.active_count() > before:
        time.sleep(0.01)
    assert exits == []
    assert capsys.readouterr().err == ""


def test_without_a_proc_nobody_watches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On macOS, where no process shows, ranks once took rank 0 for dead and never started."""
    monkeypatch.setenv(companions.LAUNCHED_BY, str(os.getppid()))
    monkeypatch.setattr(Process, "of", classmethod(lambda cls, pid: None))
    before = threading.active_count()
    Companions(tmp_path).watch_launcher()
    assert threading.active_count() == before


def test_the_last_checkpoint_is_watched_too(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch once ended before it: of two ranks that write it together one could wait for ever."""
    order: list[str] = []
    for kind in (Checkpoints, Companions):
        real = kind.on_train_end

        def note(callback: Callback, *given: Any, real: Any = real) -> None:
            real(callback, *given)
            order.append(type(callback).__name__)

        monkeypatch.setattr(kind, "on_train_end", note)
    fit(tiny_run(shards, tmp_path / "run"))
    assert order == ["Checkpoints", "Companions"]


def test_ranks_that_see_different_checkpoints_are_told() -> None:
    _check_same_start(["step-00000008.ckpt"] * 4)
    with pytest.raises(
        TrainingError, match=r"^rank 0 continues from step-8.ckpt but rank 2 from the start; put"
    ):
        _check_same_start(["step-8.ckpt", "step-8.ckpt", "the start"])


# -- two processes --------------------------------------------------------------------------------

LONG = [
    "--trainer.max_steps",
    "100000",
    "--checkpoint.every_n_steps",
    "4",
    "--trainer.val_check_interval",
    "100000",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "sinktrain"]


@pytest.fixture
def started(shards: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run of two processes, and leaves none behind."""
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str, launcher: tuple[str, ...] = ("-m", "sinktrain")) -> subprocess.Popen[str]:
        arguments = tiny_run(shards, tmp_path / "run", *TWO, *LONG, *options)
        command = [sys.executable, *launcher, "fit", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while alive := [pid for pid in pids if Process.of(pid) is not None]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05 * len(alive))
    return True


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_torchrun", [False, True])
def test_the_others_end_within_a_minute_of_a_ranks_death(
    rank: int, is_torchrun: bool, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started(launcher=tuple(TORCHRUN)) if is_torchrun else started()
    wait_for(20, tmp_path / "run", process)
    pids = processes_of(process.pid)[is_torchrun:]
    os.kill(pids[rank], signal.SIGKILL)
    assert ended(pids, within_s=60)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if rank == 0 and not is_torchrun else 1)
    assert told.count(f"rank {rank} (pid {pids[rank]}) has died; the same command continues from step-") == 1
    assert told.count("sinktrain fit: ") == 1


@pytest.mark.slow
def test_a_rank_0_that_dies_before_training_takes_the_others_along(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    """They once tried to reach it for half an hour."""
    process = started()
    told = ""
    while "from the start" not in told:  # rank 0 starts the others next
        assert process.stderr is not None
        told += process.stderr.readline()
    time.sleep(2)
    pids = processes_of(process.pid)
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    assert ended(pids, within_s=60)
    told = process.communicate(timeout=60)[1]
    assert f"sinktrain fit: rank 0 (pid {pids[0]}) has died; the same command starts again" in told


@pytest.mark.slow
def test_a_checkpoint_that_rank_0_cannot_write_ends_all_ranks_with_one_line(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    """The others once waited in a barrier for a rank 0 that had left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        process = started()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert told.count("sinktrain fit: ") == 1
    assert "step-00000004.ckpt could not be written: File too large; it takes 0.6 MB" in told
    assert "the same command starts again" in told
