"""The traps of Lightning 2.6.6 (trigger and remedy in each docstring), and stops by kill and signal."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fit import assert_same_state, checkpoint, measured
from tiny_shards import start_quickly, tiny_run, wait_for

import sinktrain
from sinktrain.cli import main
from sinktrain.model.checkpoints import load_model
from sinktrain.training.module import Pretraining
from sinktrain.training.random_states import random_states, restore_random_states


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(batch_idx, global_step, hash of the windows) of each training step."""
    noted: list[tuple[int, int, int]] = []
    real = Pretraining.training_step

    def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
        noted.append((batch_idx, module.trainer.global_step, hash(windows.numpy().tobytes())))
        real(module, windows, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", training_step)
    return noted


def test_fused_adamw_clips_under_bf16_mixed(train: Callable[..., Path]) -> None:
    """Trap 1: Lightning refuses to clip a fused optimizer's gradients under bf16-mixed. So we do."""
    run = train(
        "run", "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "24", "--model.clip_norm", "0.1"
    )
    loss = measured(run, "train/loss")
    assert loss[24] < loss[1] - 1.5
    assert measured(run, "grad_norm")[1] > 0.1  # as it was before clipping
    assert checkpoint(run)["optimizer_states"][0]["param_groups"][0]["fused"]
    assert {p.dtype for p in load_model(run, dtype=torch.float32).parameters()} == {torch.float32}
    weights = checkpoint(run)["state_dict"].values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    real = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        real(optimizer, closure)
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))  # clipped as they were read

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = train("run", "--model.clip_norm", "0.25", "--trainer.max_steps", "4")
    assert norms == pytest.approx([0.25] * 4, rel=1e-4)
    assert min(measured(run, "grad_norm").values()) > 0.25


def test_data_goes_on_in_the_middle_of_an_epoch(
    train: Callable[..., Path], seen: list[tuple[int, int, int]]
) -> None:
    """Trap 2: reading ``trainer.estimated_stepping_batches`` makes a resumed run begin its data again."""
    train("whole", "--trainer.max_steps", "20")
    whole = seen.copy()
    seen.clear()
    train("parts", "--trainer.max_steps", "9")
    train("parts", "--trainer.max_steps", "20")
    assert seen == whole
    assert len({windows for _, _, windows in whole}) == 20


def test_nothing_reads_estimated_stepping_batches() -> None:
    """Trap 2, at its root."""
    package = Path(sinktrain.__file__).parent
    assert not [path for path in package.rglob("*.py") if "estimated_stepping_batches" in path.read_text()]


def test_settings_win_over_those_of_the_checkpoint(train: Callable[..., Path]) -> None:
    """Trap 3: after ``save_hyperparameters``, and in an optimizer's state, a checkpoint beats the command."""
    train("run")
    changed = "--model.learning_rate 0.5 --model.weight_decay 0.3 --model.betas [0.8,0.9] --model.eps 1e-6"
    run = train("run", "--trainer.max_steps", "13", "--model.min_lr_ratio", "1", *changed.split())
    assert measured(run, "lr")[13] == 0.5
    decayed, spared = checkpoint(run)["optimizer_states"][0]["param_groups"]
    assert (decayed["lr"], decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.3, 0.0)
    assert (tuple(decayed["betas"]), decayed["eps"]) == ((0.8, 0.9), 1e-6)
    assert "hyper_parameters" not in checkpoint(run)


def test_random_states_are_saved_and_restored(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 6: Lightning's checkpoints hold no random state."""
    drawn: list[tuple[float, ...]] = []
    real = Pretraining.training_step

    def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        real(module, windows, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", training_step)
    train("whole")
    whole = drawn.copy()
    drawn.clear()
    train("parts", "--trainer.max_steps", "5")
    train("parts")
    assert drawn == whole


def test_random_states_survive_a_weights_only_file(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves a second draw in numpy's state
    torch.save(random_states(), tmp_path / "state.pt")
    expected = [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()]
    restore_random_states(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()] == expected


def test_lightning_sees_one_batch_a_step_whatever_the_micro_batch(
    train: Callable[..., Path], seen: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 7: Lightning broadcasts and waits for the device once a batch. So a batch is a whole step."""
    accumulated: list[int] = []
    mean_loss = Pretraining.mean_loss

    def count(module: Pretraining, windows: torch.Tensor, rows: int) -> torch.Tensor:
        accumulated.append(len(windows))
        assert module.trainer.accumulate_grad_batches == 1
        return mean_loss(module, windows, rows)

    monkeypatch.setattr(Pretraining, "mean_loss", count)
    train("run", "--data.micro_batch", "2")
    assert [(batch, step) for batch, step, _ in seen] == [(number, number) for number in range(12)]
    assert accumulated == [2] * 4 * 12


# -- signals, in this process ---------------------------------------------------------------------


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send this process signals during the step with that number."""

    def send(at_step: int, *signums: signal.Signals) -> None:
        real = Pretraining.training_step

        def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
            real(module, windows, batch_idx)
            if batch_idx == at_step:
                for signum in signums:
                    signal.raise_signal(signum)

        monkeypatch.setattr(Pretraining, "training_step", training_step)

    return send


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_code(
    signum: signal.Signals,
    code: int,
    shards: Path,
    tmp_path: Path,
    undisturbed: Path,
    train: Callable[..., Path],
    signalled: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trap 5: Lightning exits with 0 after SIGTERM, and saves nothing by itself."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signalled(5, signum)
    assert main(["fit", *tiny_run(shards, tmp_path / "parts")]) == code
    monkeypatch.undo()
    assert f"stopped by {signum.name} and saved; the same command continues" in capsys.readouterr().err
    assert checkpoint(tmp_path / "parts")["global_step"] == 6
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_state(undisturbed, train("parts"))


def test_a_stop_follows_the_validation_of_its_step(
    shards: Path, tmp_path: Path, train: Callable[..., Path], signalled: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Lightning continues behind it: a stop before it would leave that held-out loss out for ever."""
    signalled(4, signal.SIGTERM)
    assert main(["fit", *tiny_run(shards, tmp_path / "parts")]) == 143
    monkeypatch.undo()
    assert checkpoint(tmp_path / "parts")["global_step"] == 6
    assert list(measured(train("parts"), "val/loss")) == [5, 10, 12]


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    shards: Path, tmp_path: Path, signalled: Callable[..., None]
) -> None:
    """Lightning turns Ctrl-C into exit code 1."""
    signalled(6, signal.SIGINT, signal.SIGINT)
    assert main(["fit", *tiny_run(shards, tmp_path / "run")]) == 130
    assert checkpoint(tmp_path / "run")["global_step"] == 4


def test_ctrl_c_before_the_first_step_exits_with_130(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretraining, "configure_model", lambda self: signal.raise_signal(signal.SIGINT))
    assert main(["fit", *tiny_run(shards, tmp_path / "run")]) == 130


def test_another_exit_keeps_its_code(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretraining, "configure_model", lambda self: sys.exit(7))
    with pytest.raises(SystemExit) as ended:
        main(["fit", *tiny_run(shards, tmp_path / "run")])
    assert ended.value.code == 7


# -- a real kill ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_equal_an_uninterrupted_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in fresh processes: this one may have other threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--trainer.max_steps", "40", "--checkpoint.every_n_steps", "7", "--data.micro_batch", "1"]
    arguments = tiny_run(shards, tmp_path / "parts", *options)
    process = start_quickly(arguments)
    wait_for(16, tmp_path / "parts", process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    reached = checkpoint(tmp_path / "parts")["global_step"]
    assert 14 <= reached < 40
    again = start_quickly(arguments)
    uninterrupted = start_quickly(tiny_run(shards, tmp_path / "whole", *options))
    for process in (again, uninterrupted):
        process.join(timeout=120)
        assert process.exitcode == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert measured(tmp_path / "whole", "train/loss") == measured(tmp_path / "parts", "train/loss")
    assert measured(tmp_path / "whole", "val/loss") == measured(tmp_path / "parts", "val/loss")
