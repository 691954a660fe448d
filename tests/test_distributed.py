"""Two processes on the CPU (gloo) train what one process trains, and stop together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from test_fit import checkpoint
from tiny_shards import start, tiny_run, wait_for
from two_processes import CONSTANT, assert_close, processes_of

TWO = ["--config", "ddp", "--trainer.devices", "2"]


@pytest.mark.usefixtures("alone_again")
def test_ddp_with_micro_batches_equals_one_device(train_for: Callable[..., Path]) -> None:
    """DDP of one process: gradients meet in its buckets, and are exchanged after the last micro-batch."""
    whole = train_for("whole", 12)
    parts = train_for("parts", 12, "--config", "ddp", "--trainer.devices", "1", "--data.micro_batch", "2")
    assert_close(whole, parts)


@pytest.mark.slow  # two processes import lightning one after the other
def test_one_process_then_two_then_one_equal_one_process(
    shards: Path, tmp_path: Path, train_for: Callable[..., Path]
) -> None:
    """Steps 1-6 on one process, 7-12 on two with micro-batches, 13-16 on one."""
    sink = ["--config", "sink"]
    whole = train_for("whole", 16, *sink)
    train_for("parts", 6, *sink)
    steps = ["--trainer.max_steps", "12", "--data.micro_batch", "2"]
    process = start(tiny_run(shards, tmp_path / "parts", *CONSTANT, *sink, *TWO, *steps))
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert told.count("from step-00000006.ckpt") == 1, told  # said by rank 0 alone
    assert told.count("finished at step 12") == 1, told
    assert_close(whole, train_for("parts", 16, *sink))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_process_stops_both_and_saves(
    rank: int, shards: Path, tmp_path: Path, train_for: Callable[..., Path]
) -> None:
    """Trap 4: Lightning broadcasts inside the handler, and waits for ever if it is not rank 0's."""
    steps = ["--trainer.max_steps", "100000", "--checkpoint.every_n_steps", "100000"]
    process = start(tiny_run(shards, tmp_path / "parts", *CONSTANT, *TWO, *steps))
    wait_for(20, tmp_path / "parts", process)
    os.kill(processes_of(process.pid)[rank], signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143, told
    assert told.count("stopped by SIGTERM and saved; the same command continues") == 1, told
    stopped_at = checkpoint(tmp_path / "parts")["global_step"]
    end = stopped_at + 4
    assert_close(train_for("whole", end), train_for("parts", end))
