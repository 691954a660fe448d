"""Progress as it is seen: one live line on a terminal of any width, and plain lines in a log file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from sinktrain import progress
from sinktrain.progress import LogLines, progress_bar
from sinktrain.training.metrics import Metrics, ProgressBar
from sinktrain.training.metrics_table import MetricsTable

MEASURED = {"train/loss": 2.8253, "val/loss": 2.7012, "tokens_per_s": 551_234.4, "mfu": 0.4751}


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A pseudo-terminal as stderr; what is given tells what was written to it. 0 columns: of unknown size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w", encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)

        def told() -> str:
            print("<end>", end="", file=stderr, flush=True)
            seen = b""
            while not seen.endswith(b"<end>"):
                seen += screen.read(1000)
            return seen.decode().removesuffix("<end>").replace("\r\n", "\n")

        yield told


def rows(told: str) -> list[list[str]]:
    """For each row of the screen, what was drawn over each other there."""
    return [row.split("\r") for row in told.split("\n")]


def fit_with_a_line_between(path: Path) -> None:
    """What ``sinktrain fit`` shows of 4 steps of 143,000, the third followed by a line of another's."""
    told = Metrics(MetricsTable(path / "metrics.csv"))
    bar = ProgressBar(told, is_live=True)
    trainer: Any = SimpleNamespace(global_step=99_000, max_steps=143_000)
    bar.on_train_start(trainer)
    told.latest = dict(MEASURED)
    for step in range(4):
        bar._bar.mininterval = bar._bar.miniters = 0  # every step is shown
        trainer.global_step += 1
        bar.on_train_batch_end(trainer)
        if step == 2:
            tqdm.write("streaming was measured", file=sys.stderr)
    bar.on_train_end()


# -- a terminal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [200, 80, 60, 40, 0])
def test_fit_has_one_live_line_within_the_terminal(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(columns, monkeypatch) as told:
        fit_with_a_line_between(tmp_path)
        first, last = rows(told())
    drawn = [text for text in first + last if text.startswith("fit ")]
    assert len(drawn) >= 5
    assert max(map(len, first + last)) < (columns or 80)
    assert "streaming was measured" in first
    assert not last[-1]
    assert not last[-2].strip()


@pytest.mark.parametrize(
    ("columns", "last"),
    [(200, "551,234 tok/s, mfu 47.5%"), (80, "551,234 tok/s"), (60, "loss 2.825"), (40, "left")],
)
def test_what_does_not_fit_is_left_out_and_never_cut(
    columns: int, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 60 columns, 17,985 tok/s were told as ``17,``."""
    with terminal(columns, monkeypatch) as told:
        fit_with_a_line_between(tmp_path)
        [newest, *_] = [text for text in reversed(rows(told())[1]) if text.startswith("fit ")]
    assert newest.rstrip().endswith(last)


def test_a_terminal_of_unknown_size_shows_every_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as ``script`` makes without a terminal of its own; tqdm showed nothing there."""
    with terminal(0, monkeypatch) as told:
        with progress_bar(total=4, desc="tokenising") as bar:
            bar.update(4)
        assert re.search(r"\rtokenising:   0%\|.{30,}\| 0/4 \[", told())


# -- a log file -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds since the last line."""
    told = LogLines()
    clock = SimpleNamespace(now=told.told_at)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(progress, "_LOG", told)
    return clock


def test_a_log_gets_a_plain_line_now_and_then(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(total=100, desc="tokenising", unit="B", unit_scale=True) as bar:
        for _ in range(100):
            bar.last_print_t -= 2.0  # as if so long had passed for tqdm too
            clock.now += 1.0
            bar.update()
    told = capsys.readouterr().err
    assert "\r" not in told
    assert re.fullmatch(r"(tokenising: +\d+% [\d.]+/100 \[\d\d:\d\d<\d\d:\d\d, .+/.+\]\n){9,10}", told)


def test_a_short_command_puts_nothing_into_a_log(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(total=2, desc="measuring") as bar:
        clock.now += progress.LOG_INTERVAL_S - 1
        bar.update(2)
    assert not capsys.readouterr().err


def test_of_many_short_bars_one_is_told_now_and_then(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        with progress_bar(total=1, desc=f"cell {number}") as bar:
            bar.update()
        clock.now += 4.0
    assert re.findall("cell \\d", capsys.readouterr().err) == ["cell 3", "cell 6", "cell 9"]
