"""Runs of a study as processes of their own, one a device: one that fails stops no other."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from sinktrain.training.run import LOCK

POLL_S = 0.5
_PARENT_DIED = 1
"""``PR_SET_PDEATHSIG`` of Linux."""

State = Literal["waiting", "training", "finished", "failed", "stopped"]


class StudyStopped(BaseException):
    """A signal ended the study; what ran has saved, and the same command continues."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command continues")
        self.signum = signum


@dataclass
class Job:
    """A command that trains a run.

    Args:
        name: of the run.
        command: what is executed.
        run: its folder; while another process trains there, the job waits.
        log: what it says goes there.
    """

    name: str
    command: list[str]
    run: Path
    log: Path
    state: State = "waiting"
    started_at: float = 0.0
    elapsed_s: float = 0.0
    exit_code: int | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def last_line(self) -> str:
        """The end of what it said, a live bar's remains included."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Board(Protocol):
    """Is told of every change; see ``study_board``."""

    def show(self, jobs: Sequence[Job]) -> None: ...


def train_all(
    jobs: Sequence[Job], devices: Sequence[str | None], board: Board, begin: Callable[[Job], None]
) -> None:
    """Start each job as soon as a device is free, and wait for all.

    Args:
        devices: values of ``CUDA_VISIBLE_DEVICES``, one for each job at a time; None leaves it as it is.
        begin: is called with each job right before it starts, when nobody else is in its folder.

    Raises:
        StudyStopped: by a signal, when the jobs that were running have saved.
    """
    waiting, running = deque(jobs), dict[str | None, Job]()
    with _caught_signals() as signums:
        num_passed = 0
        while running or (waiting and not signums):
            free = [device for device in devices if device not in running and not signums]
            for device, job in zip(free, [job for job in waiting if is_free(job.run)], strict=False):
                waiting.remove(job)
                begin(job)
                _start(job, device)
                running[device] = job
            time.sleep(POLL_S)
            for signum in signums[num_passed:]:
                _pass_on(signum, running.values())
                num_passed += 1
            for device, job in list(running.items()):
                if _has_ended(job):
                    del running[device]
            board.show(jobs)
    if signums:
        raise StudyStopped(signums[0])


def call(command: list[str]) -> int:
    """Run a command whose output is ours.

    Returns:
        Its exit code.

    Raises:
        StudyStopped: by a signal, when the command, which was passed it, has ended.
    """
    with _caught_signals() as signums:
        process, num_passed = _spawn(command), 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(POLL_S)
                break
            for signum in signums[num_passed:]:
                process.send_signal(signum)
                num_passed += 1
    if signums:
        raise StudyStopped(signums[0])
    return code


def _spawn(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        start_new_session=True,  # Ctrl-C comes once, from us
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        **options,
    )


def _start(job: Job, device: str | None) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with job.log.open("ab") as log:
        job.process = _spawn(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    job.state, job.started_at = "training", time.monotonic()


def _end_with_parent() -> None:
    """SIGTERM, after which a run saves, when the study is killed and can no longer pass it on."""
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)


def _has_ended(job: Job) -> bool:
    assert job.process is not None
    job.exit_code = job.process.poll()
    job.elapsed_s = time.monotonic() - job.started_at
    if job.exit_code is None:
        return False
    stopped = job.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    job.state = "finished" if job.exit_code == 0 else "stopped" if stopped else "failed"
    return True


def is_free(run: Path) -> bool:
    """Whether no process trains there, such as one of a killed study that is still saving."""
    try:
        with (run / LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _pass_on(signum: int, jobs: Iterable[Job]) -> None:
    for job in jobs:
        if job.process is not None:
            job.process.send_signal(signum)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Gives the list of those Ctrl-C and SIGTERM that came: they wait there to be passed on."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
