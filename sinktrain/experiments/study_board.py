"""How a study goes: a live table on a terminal, and in a log file a line at every change and now and then."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from statistics import mean

from sinktrain.experiments.study_pool import Job
from sinktrain.progress import LOG_INTERVAL_S
from sinktrain.report.wording import printable
from sinktrain.training.metrics_table import MetricsTable

REDRAW_S = 1.0


class StudyBoard:
    """Told on stderr.

    Args:
        name: of the study.
        num_devices: jobs that run at once.
        num_done: runs of the study that needed no job.
    """

    def __init__(self, name: str, num_devices: int, num_done: int) -> None:
        self.name, self.num_devices, self.num_done = name, num_devices, num_done
        self.is_live = sys.stderr.isatty()
        self._told: dict[str, str] = {}
        self._told_at = time.monotonic()
        self._num_lines = 0

    def show(self, jobs: Sequence[Job]) -> None:
        now = time.monotonic()
        if self.is_live:
            is_over = all(job.state not in ("waiting", "training") for job in jobs)
            if is_over or now - self._told_at >= REDRAW_S:
                self._draw([*(f"  {job.name:<16} {self._line(job)}" for job in jobs), self._sum(jobs)])
                self._told_at = now
            return
        for job in jobs:
            if self._told.get(job.name, "waiting") != job.state:
                self._told[job.name] = job.state
                print(f"{self.name}: {job.name} {self._line(job)}", file=sys.stderr, flush=True)
        if now - self._told_at >= LOG_INTERVAL_S:
            going = [f"{job.name} {_progress(job)}" for job in jobs if job.state == "training"]
            print("; ".join([self._sum(jobs), *going]), file=sys.stderr, flush=True)
            self._told_at = now

    def _draw(self, lines: list[str]) -> None:
        up = f"\x1b[{self._num_lines}F" if self._num_lines else ""
        width = shutil.get_terminal_size().columns - 1  # a line that wraps would be two to go up
        shown = [printable(line)[:width] for line in lines]
        print(up + "\n".join(f"\x1b[K{line}" for line in shown), file=sys.stderr, flush=True)
        self._num_lines = len(lines)

    def _line(self, job: Job) -> str:
        if job.state == "training":
            return f"training  {_progress(job)}"
        if job.state == "failed":
            return f"failed    {_reason(job)} ({job.log})"
        spent = f"  {_time(job.elapsed_s)}" if job.exit_code is not None else ""
        return f"{job.state}{spent}"

    def _sum(self, jobs: Sequence[Job]) -> str:
        ended = sum(job.state == "finished" for job in jobs)
        left = self._left_s(jobs)
        eta = "" if left is None else f", {_time(left)} left"
        return f"{self.name}: {self.num_done + ended} of {self.num_done + len(jobs)} runs done{eta}"

    def _left_s(self, jobs: Sequence[Job]) -> float | None:
        """From runs that ended, or from what those that train expect; None before anything is known."""
        going = [job for job in jobs if job.state == "training"]
        left = [_eta_s(job) for job in going]
        whole = [job.elapsed_s for job in jobs if job.state == "finished"]
        whole += [job.elapsed_s + eta for job, eta in zip(going, left, strict=True) if eta is not None]
        if not whole:
            return None
        usual = mean(whole)
        known = [
            max(0.0, usual - job.elapsed_s) if eta is None else eta
            for job, eta in zip(going, left, strict=True)
        ]
        waiting = sum(job.state == "waiting" for job in jobs)
        return max([*known, (sum(known) + waiting * usual) / self.num_devices], default=0.0)


def _reason(job: Job) -> str:
    if job.exit_code is not None and job.exit_code < 0:
        return f"killed by {signal.Signals(-job.exit_code).name}"
    return job.last_line or f"exit code {job.exit_code}"


def _progress(job: Job) -> str:
    """Where the run is, as its ``metrics.csv`` tells."""
    rows = MetricsTable(job.run / "metrics.csv").rows()
    if not rows:
        return "starting"
    newest = rows[-1]
    loss = newest.get("train/loss") or next(
        (row["train/loss"] for row in reversed(rows) if row["train/loss"]), ""
    )
    eta = _eta_s(job)
    parts = [f"step {int(newest['step']):,}", f"loss {float(loss):.3f}" if loss else ""]
    parts.append("" if eta is None else f"{_time(eta)} left")
    return ", ".join(filter(None, parts))


def _eta_s(job: Job) -> float | None:
    rows = MetricsTable(job.run / "metrics.csv").rows()
    told = [row["eta_s"] for row in rows[-20:] if row.get("eta_s")]
    return float(told[-1]) if told else None


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
