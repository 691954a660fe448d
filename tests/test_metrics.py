"""What a user sees of a run while it trains: time left, memory, a live line or plain ones."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fit import measured, rows

from sinktrain.training import metrics
from sinktrain.training.metrics import Metrics, ProgressBar, _summary
from sinktrain.training.metrics_table import COLUMNS, MetricsTable, curves, train_seconds
from sinktrain.training.module import Pretraining
from sinktrain.training.step import Stepper


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two lines."""
    monkeypatch.setattr(ProgressBar, "LINE_INTERVAL_S", 0.0)


def lines(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("step ")]


# -- time and memory ------------------------------------------------------------------------------


def times_left(path: Path, steps: list[int], seconds: list[float]) -> list[float | None]:
    """What is said at these steps of 1000, reached after these seconds."""
    told = Metrics(MetricsTable(path / "metrics.csv"))
    trainers: list[Any] = [SimpleNamespace(global_step=step, max_steps=1000) for step in steps]
    return [
        told._time_left(trainer, now).get("eta_s") for trainer, now in zip(trainers, seconds, strict=True)
    ]


def test_the_time_left_is_that_of_the_steps_to_come_at_the_rate_of_those_before(tmp_path: Path) -> None:
    """The first interval, in which the network compiles, does not count; a validation does."""
    assert times_left(tmp_path, [10, 20, 30, 1000], [100.0, 105.0, 115.0, 600.0]) == [
        None,
        pytest.approx(980 * 0.5),
        pytest.approx(970 * 0.75),
        0.0,
    ]


def test_the_time_left_follows_a_changed_rate(tmp_path: Path) -> None:
    steps = list(range(10, 510, 10))
    seconds = [step * 1.0 for step in steps[:25]] + [250 + (step - 250) * 3.0 for step in steps[25:]]
    assert times_left(tmp_path, steps, seconds)[-1] == pytest.approx(500 * 3.0)


def test_a_run_says_how_long_it_takes_from_its_second_row_on(train: Callable[..., Path]) -> None:
    run = train("run", "--trainer.log_every_n_steps", "3")
    left = measured(run, "eta_s")
    assert list(left) == [6, 9, 12]
    assert left[6] > left[12] == 0
    assert not measured(run, "memory_bytes")  # the device's own; on the CPU it is everybody's
    assert tuple(rows(run)[0]) == COLUMNS


def test_values_are_taken_from_the_device_only_when_they_are_logged(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would wait for the device."""
    read: list[int] = []
    real, step = torch.Tensor.__float__, Stepper.__call__

    def noted_step(stepper: Stepper, *arguments: Any) -> None:
        step(stepper, *arguments)
        assert stepper.loss is not None
        watched.append(stepper.loss.data_ptr())

    def noted_float(tensor: torch.Tensor) -> float:
        if tensor.data_ptr() in watched[-1:]:
            read.append(len(watched))
        return real(tensor)

    watched: list[int] = []
    monkeypatch.setattr(Stepper, "__call__", noted_step)
    monkeypatch.setattr(torch.Tensor, "__float__", noted_float)
    train("run", "--trainer.log_every_n_steps", "4", "--trainer.limit_val_batches", "0")
    assert read == [4, 8, 12]


def test_a_table_of_an_older_version_gets_the_columns_that_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,mfu\n1,2.5,\n")
    MetricsTable(path).append(2, {"train/loss": 2.25, "eta_s": 8.0, "memory_bytes": 1e9})
    assert path.read_text() == "step,train/loss,mfu,eta_s,memory_bytes\n1,2.5,,,\n2,2.25,,8.0,1000000000.0\n"


# -- lines ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_line")
def test_without_a_terminal_each_logged_step_is_a_line(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar in a log file, of SLURM's for instance, was one line of a thousand carriage returns."""
    train("run", "--trainer.log_every_n_steps", "3", "--trainer.enable_progress_bar", "true")
    told = capsys.readouterr().err
    assert "\r" not in told
    first, second, third, last = lines(told)
    assert re.fullmatch(r"step 3/12: loss \d\.\d{3}, [\d,]+ tok/s", first)
    assert re.fullmatch(r"step 6/12: loss \d\.\d{3}, val \d\.\d{3}, [\d,]+ tok/s, \d:\d\d:\d\d left", second)
    assert third.startswith("step 9/12: ")
    assert last.endswith(", 0:00:00 left")


def bar_of(path: Path) -> ProgressBar:
    told = Metrics(MetricsTable(path / "metrics.csv"))
    told.latest = {"train/loss": 2.0}
    return ProgressBar(told, is_live=False)


def step_to(bar: ProgressBar, step: int) -> None:
    trainer: Any = SimpleNamespace(global_step=step, max_steps=100, log_every_n_steps=2)
    bar.on_train_batch_end(trainer)


def test_a_line_comes_at_once_and_then_not_before_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = bar_of(tmp_path)
    for step in range(1, 13):
        monkeypatch.setattr(metrics.time, "perf_counter", lambda now=8.0 * step: now)
        step_to(bar, step)
    assert lines(capsys.readouterr().err) == [f"step {step}/100: loss 2.000" for step in (2, 6, 10)]


def test_other_ranks_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = bar_of(tmp_path)
    trainer: Any = SimpleNamespace(is_global_zero=False)
    bar.setup(trainer, Pretraining.__new__(Pretraining), "fit")
    step_to(bar, 2)
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("every_line")
def test_skipped_steps_are_told(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pretraining.mean_loss

    def mean_loss(module: Pretraining, windows: torch.Tensor, rows: int) -> torch.Tensor:
        loss = real(module, windows, rows)
        return loss * float("nan") if module.trainer.global_step in (2, 5) else loss

    monkeypatch.setattr(Pretraining, "mean_loss", mean_loss)
    train("run", "--trainer.max_steps", "8")
    told = lines(capsys.readouterr().err)
    assert "skipped" not in told[1]
    assert "loss nan" in told[2]
    assert ", 1 skipped" in told[2]
    assert ", 2 skipped" in told[-1]


# -- the bar --------------------------------------------------------------------------------------


def test_on_a_terminal_there_is_one_live_line(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train("run", "--trainer.enable_progress_bar", "true", "--trainer.max_steps", "6")
    told = terminal.getvalue()
    assert not lines(told)
    assert re.search(r"\rfit +\d+%\|.*\| \d/6, \S+ left", told)


def test_everything_at_once_fits_into_a_line() -> None:
    latest = {
        "train/loss": 10.8253,
        "val/loss": 10.7012,
        "tokens_per_s": 551_234.4,
        "mfu": 0.4751,
        "memory_bytes": 31.25 * 2**30,
        "skipped_steps": 12.0,
        "lr": 6e-4,
        "eta_s": 3.0,
    }
    told = "loss 10.825, val 10.701, 551,234 tok/s, mfu 47.5%, 31.2 GiB"
    assert _summary(latest) == f"{told}, 12 skipped"
    assert len(f"fit  45%|█| 99000/143000, 6:20:01 left, {told}") <= 100
    assert _summary({"train/loss": 2.5, "skipped_steps": 0.0}) == "loss 2.500"


def _curve(metric: str, *points: list[Any]) -> dict[str, Any]:
    return {"metric": metric} | dict(
        zip(("step", "tokens_seen", "train_seconds", "value"), points, strict=True)
    )


def test_the_course_of_a_run_and_its_time_are_those_of_its_rows(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append(10, {"tokens_seen": 1000.0, "tokens_per_s": 100.0, "train/loss": 5.0})
    table.append(15, {"stream/gap": 0.25, "sink/metric": 0.5})
    table.append(20, {"tokens_seen": 2000.0, "tokens_per_s": 500.0})
    table.append(20, {"val/loss": 4.5})
    table.append(30, {"tokens_seen": 3000.0, "tokens_per_s": 1000.0})
    table.append(30, {"val/loss": 4.0})
    assert train_seconds(table.rows()) == 1000 / 100 + 1000 / 500 + 1000 / 1000
    assert curves(table.rows()) == [
        _curve("val/loss", [20, 30], [2000, 3000], [12.0, 13.0], [4.5, 4.0]),
        _curve("stream/gap", [15], [1500], [11.0], [0.25]),
        _curve("sink/metric", [15], [1500], [11.0], [0.5]),
    ]
    table.append(36, {"val/loss": 3.9})
    table.append(36, {"stream/gap": math.nan})
    behind = curves(table.rows())[0]  # what was measured behind the last line of the log
    assert (behind["tokens_seen"][-1], behind["train_seconds"][-1]) == (3600, 13.6)
    assert [curve["metric"] for curve in curves(table.rows())] == ["val/loss", "stream/gap", "sink/metric"]
    assert curves(table.rows())[1]["value"] == [0.25]
    assert train_seconds([]) == 0
    assert curves([]) == []
