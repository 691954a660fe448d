"""Two processes on the CPU (gloo) train what one process trains, and stop together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_fit import checkpoint, measured
from tiny_shards import start, tiny_run, wait_for

from sinktrain.training.fit import fit

# A large eps: where a gradient is zero but for rounding (the biases of keys), Adam would make steps of it.
CONSTANT = ["--model.schedule", "wsd", "--model.decay_steps", "0", "--model.eps", "1e-4"]
TWO = ["--config", "ddp", "--trainer.devices", "2"]


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, max_steps: int, *options: str) -> Path:
        fit(tiny_run(shards, tmp_path / name, *CONSTANT, "--trainer.max_steps", str(max_steps), *options))
        return tmp_path / name

    return run


def assert_close(whole: Path, parts: Path) -> None:
    """Same batches, same steps, same weights, but for the order of float32 sums."""
    for name in ("train/loss", "val/loss", "grad_norm", "tokens_seen", "lr"):
        expected, found = measured(whole, name), measured(parts, name)
        if name == "val/loss":  # parts validate at their ends too
            found = {step: found[step] for step in expected}
        assert found == pytest.approx(expected, rel=1e-5), name
    expected, found = (checkpoint(run)["state_dict"] for run in (whole, parts))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        difference = (weight - found[name]).abs().max()
        assert difference < 1e-5, f"{name}: {difference:.1e}"
    states = [checkpoint(run)["WindowData"] for run in (whole, parts)]
    assert states[0] == states[1]


@pytest.fixture
def _alone_again() -> Iterator[None]:
    """Leaves nothing of a process group to other tests."""
    environment = dict(os.environ)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("_alone_again")
def test_ddp_with_micro_batches_equals_one_device(train: Callable[..., Path]) -> None:
    """DDP of one process: gradients meet in its buckets, and are exchanged after the last micro-batch."""
    whole = train("whole", 12)
    parts = train("parts", 12, "--config", "ddp", "--trainer.devices", "1", "--data.micro_batch", "2")
    assert_close(whole, parts)


@pytest.mark.slow  # two processes import lightning one after the other
def test_one_process_then_two_then_one_equal_one_process(
    shards: Path, tmp_path: Path, train: Callable[..., Path]
) -> None:
    """Steps 1-6 on one process, 7-12 on two with micro-batches, 13-16 on one."""
    sink = ["--config", "sink"]
    whole = train("whole", 16, *sink)
    train("parts", 6, *sink)
    steps = ["--trainer.max_steps", "12", "--data.micro_batch", "2"]
    process = start(tiny_run(shards, tmp_path / "parts", *CONSTANT, *sink, *TWO, *steps))
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert told.count("from step-00000006.ckpt") == 1, told  # said by rank 0 alone
    assert told.count("finished at step 12") == 1, told
    assert_close(whole, train("parts", 16, *sink))


def processes_of(pid: int) -> list[int]:
    """A process and the one that Lightning has it start for the other rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_process_stops_both_and_saves(
    rank: int, shards: Path, tmp_path: Path, train: Callable[..., Path]
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
    assert_close(train("whole", end), train("parts", end))
