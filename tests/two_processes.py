"""What tests of runs on several devices share: what to compare with one device, and whom to signal."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import checkpoint, measured

from sinktrain.training.module import Pretraining

# A large eps: where a gradient is zero but for rounding (the biases of keys), Adam would make steps of it.
CONSTANT = ["--model.schedule", "wsd", "--model.decay_steps", "0", "--model.eps", "1e-4"]


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


def layout(value: Any) -> Any:
    """The same with tensors' kinds in place of their numbers."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape, value.device
    if isinstance(value, dict):
        return {key: layout(inner) for key, inner in value.items()}
    return [layout(inner) for inner in value] if isinstance(value, list) else value


def hold_back_writing(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let no checkpoint be written before step 6 has been taken; fills up with what was handed over."""
    real_save, real_step = torch.save, Pretraining.training_step
    is_at_6, handed_over = threading.Event(), []

    def save(state: dict[str, Any], file: Any) -> None:
        handed_over.append(state)
        assert is_at_6.wait(60)
        real_save(state, file)

    def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
        real_step(module, windows, batch_idx)
        if module.trainer.global_step == 6:
            is_at_6.set()

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(Pretraining, "training_step", training_step)
    return handed_over


def addresses(value: Any) -> set[int]:
    """Where the tensors in it lie in memory."""
    if isinstance(value, torch.Tensor):
        return {value.data_ptr()}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(addresses, inner))


def processes_of(pid: int) -> list[int]:
    """A process and the one that Lightning has it start for the other rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]
