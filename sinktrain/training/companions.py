"""Fellow ranks: a run whose process dies takes the others on its host along, instead of leaving them to wait.

A collective waits for a rank that will never come: under NCCL for half an hour. So every rank looks at
its fellows' entries in ``/proc`` once a second. Ranks on other hosts are the launcher's to end: torchrun
and srun do (``srun --kill-on-bad-exit``), once one of theirs has failed. Without a ``/proc`` nobody watches.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Callback
from torch import distributed

from sinktrain.errors import TrainingError
from sinktrain.training.saving import what_continues

LOOK_EVERY_S = 1.0
GRACE_S = 3.0
"""How much sooner than this one a fellow may end when all end together."""

LAUNCHED_BY = "SINKTRAIN_RANK_0"
"""The environment variable by which rank 0 tells its pid to those that Lightning has it start."""


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one of the same pid.

    Args:
        pid: in the namespace of this process.
        started_at: clock ticks after the machine's start.
    """

    pid: int
    started_at: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that runs under that pid; None for one that has ended, waited for or not."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        state, *fields = stat.rpartition(")")[2].split()  # behind the name, which may hold anything
        return None if state in "ZX" else cls(pid, int(fields[18]))

    @property
    def is_alive(self) -> bool:
        return Process.of(self.pid) == self


class Watch:
    """A thread that ends this process when another one of the run has died.

    Args:
        rank: of this process.
        fellows: the other ranks of this host.
        checkpoints: the folder that the run continues from.
    """

    def __init__(self, rank: int, fellows: dict[int, Process], checkpoints: Path) -> None:
        self.rank = rank
        self.fellows = fellows
        self.checkpoints = checkpoints
        self._first_dead: list[int] = []
        self._is_over = threading.Event()
        self._leaving = threading.Lock()
        threading.Thread(target=self._look, daemon=True, name="companions").start()

    def close(self) -> None:
        self._is_over.set()

    def end_if_bereft(self, wait_s: float) -> None:
        """End this process if a fellow is found dead within that time."""
        deadline = time.monotonic() + wait_s
        while not (dead := self._dead()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        self._end(dead)

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_EVERY_S):
            dead = self._dead()
            if dead:
                if not self._is_over.wait(GRACE_S):
                    self._end(dead)
                return

    def _dead(self) -> list[int]:
        """Who was found dead first: fellows that end because of it are no news."""
        if not self._first_dead:
            self._first_dead = [rank for rank, process in self.fellows.items() if not process.is_alive]
        return self._first_dead

    def _end(self, dead: list[int]) -> None:
        """Say what happened, once for the host, and leave; whatever the main thread waits for."""
        self._leaving.acquire()  # the other thread, which may come to see it too, stands still here
        speaker = min({self.rank, *self.fellows} - set(dead))
        if self.rank == speaker:
            who = ", ".join(f"rank {rank} (pid {self.fellows[rank].pid})" for rank in dead)
            have = "has" if len(dead) == 1 else "have"
            line = f"sinktrain fit: {who} {have} died; {what_continues(self.checkpoints)}"
            print(line, file=sys.stderr, flush=True)
        time.sleep(2 * LOOK_EVERY_S)  # or fellows that have not looked would count this one among the dead
        os._exit(1)


class Companions(Callback):
    """Watches the other ranks of this host from set-up to the end of training.

    Args:
        checkpoints: the folder that the run continues from.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self._watch: Watch | None = None

    def watch_launcher(self) -> None:
        """Watch rank 0 from the first moment, in a process that Lightning's launcher started.

        Raises:
            TrainingError: rank 0 has died meanwhile.
        """
        pid = int(os.environ.get(LAUNCHED_BY, 0))
        has_proc = Process.of(os.getpid()) is not None
        if pid in (0, os.getpid()) or "TORCHELASTIC_RUN_ID" in os.environ or not has_proc:
            return
        rank_zero = Process.of(pid)
        if rank_zero is None:
            raise TrainingError(f"rank 0 (pid {pid}) has died; {what_continues(self.checkpoints)}")
        if os.getppid() == pid:
            self._watch = Watch(int(os.environ.get("LOCAL_RANK", 1)), {0: rank_zero}, self.checkpoints)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell each other who and where we are, and what we continue from.

        Raises:
            TrainingError: ranks see different checkpoints.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        told: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(told, (_place(), Process.of(os.getpid()), _start(trainer)))
        _check_same_start([start for _, _, start in told])
        self.close()
        fellows = {
            rank: process
            for rank, (place, process, _) in enumerate(told)
            if rank != trainer.global_rank and place == _place() and process is not None
        }
        if fellows:
            self._watch = Watch(trainer.global_rank, fellows, self.checkpoints)
            _retire_lightnings_observer()

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.strategy.barrier()
        self.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """A collective that fails because a rank has died says so in its own words, at length."""
        if self._watch is not None and isinstance(exception, RuntimeError):
            self._watch.end_if_bereft(wait_s=1.0)
        self.close()

    def teardown(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _place() -> tuple[str, str]:
    """What processes share that can see each other: the host, and in it the namespace of pids."""
    namespace = Path("/proc/self/ns/pid")
    return socket.gethostname(), str(namespace.readlink()) if namespace.is_symlink() else ""


def _start(trainer: pl.Trainer) -> str:
    path = trainer.ckpt_path
    return "the start" if path is None else Path(path).resolve().name


def _check_same_start(starts: list[str]) -> None:
    if len(set(starts)) > 1:
        other = next(rank for rank, start in enumerate(starts) if start != starts[0])
        raise TrainingError(
            f"rank 0 continues from {starts[0]} but rank {other} from {starts[other]}; "
            "put --run on a file system that all hosts share"
        )


def _retire_lightnings_observer() -> None:
    """Lightning's own looks every 5 s, and kills rank 0 without a word: also when all end together."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            setattr(thread, "_run", lambda: True)  # noqa: B010 — true ends it
