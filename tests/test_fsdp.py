"""FSDP2 trains what one device trains, and its checkpoints are those of one device."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import assert_bitwise_equal, checkpoint, measured
from tiny_shards import start, tiny_run, wait_for
from two_processes import CONSTANT, addresses, assert_close, hold_back_writing, layout, processes_of

from sinktrain.model.checkpoints import load_model
from sinktrain.publishing.export import export
from sinktrain.training.fit import validate
from sinktrain.training.fsdp import FSDP2Strategy, ShardedStepper
from sinktrain.training.module import Pretraining
from sinktrain.training.sharding import GATHERED

ONE = ["--config", "fsdp", "--trainer.devices", "1"]
TWO = ["--config", "fsdp", "--trainer.devices", "2"]
MICRO = ["--data.micro_batch", "2"]
ZERO_2 = ["--trainer.strategy.init_args.reshard_after_forward", "false"]
alone = pytest.mark.usefixtures("alone_again")


# -- one process ----------------------------------------------------------------------------------


@alone
@pytest.mark.parametrize(
    "more", [[], pytest.param([*ZERO_2, "--model.recompute_activations", "true"], marks=pytest.mark.slow)]
)
def test_one_process_equals_one_device_step_by_step(
    more: list[str], whole: Path, train_for: Callable[..., Path]
) -> None:
    assert_close(whole, train_for("parts", 12, *ONE, *MICRO, *more))


@alone
def test_a_run_goes_from_one_device_to_fsdp_and_back(whole: Path, train_for: Callable[..., Path]) -> None:
    train_for("parts", 5)
    train_for("parts", 9, *ONE)
    assert_close(whole, train_for("parts", 12))


@alone
@pytest.mark.slow
def test_its_checkpoint_is_laid_out_as_that_of_one_device(
    whole: Path, train_for: Callable[..., Path]
) -> None:
    expected, found = checkpoint(whole, "step-00000004.ckpt"), checkpoint(train_for("sharded", 4, *ONE))
    assert expected.keys() == found.keys()
    for key in ("state_dict", "optimizer_states"):
        assert layout(expected[key]) == layout(found[key])


@alone
def test_steps_taken_while_a_checkpoint_is_written_do_not_change_it(
    train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is there a second copy of what was gathered."""
    expected = checkpoint(train_for("expected", 6, *ONE), "step-00000004.ckpt")
    real, gathered = FSDP2Strategy._gather, []

    def gather(*tensors: Any) -> dict[Any, torch.Tensor]:
        gathered.append(real(*tensors))
        return gathered[-1]

    monkeypatch.setattr(FSDP2Strategy, "_gather", gather)
    handed_over = hold_back_writing(monkeypatch)
    found = checkpoint(train_for("found", 6, *ONE), "step-00000004.ckpt")
    assert_bitwise_equal(expected, found)
    for key in GATHERED:
        assert addresses(handed_over[0][key]) <= addresses(gathered)


@alone
def test_validate_gathers_what_one_device_wrote(whole: Path, shards: Path, tmp_path: Path) -> None:
    last = ["--ckpt_path", str(whole / "checkpoints" / "last.ckpt")]
    found = validate(tiny_run(shards, tmp_path / "none", *CONSTANT, *ONE, *last))
    assert found["val/loss"] == pytest.approx(measured(whole, "val/loss")[12], rel=1e-6)


@alone
def test_bf16_gathers_bfloat16_weights_and_keeps_float32_ones(train_for: Callable[..., Path]) -> None:
    bf16 = ["--trainer.precision", "bf16-mixed"]
    plain, sharded = train_for("plain", 3, *bf16), train_for("sharded", 3, *bf16, *ONE, *MICRO)
    losses = measured(plain, "train/loss")
    assert measured(sharded, "train/loss") == pytest.approx(losses, abs=5e-3)
    assert measured(sharded, "val/loss") != measured(plain, "val/loss")  # norms have bfloat16 weights here
    assert layout(checkpoint(plain)["state_dict"]) == layout(checkpoint(sharded)["state_dict"])


@alone
def test_clipping_bounds_the_gradient_that_the_optimizer_sees(
    train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    real = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        shards = [p.grad.to_local() for group in optimizer.param_groups for p in group["params"]]
        real(optimizer, closure)
        norms.append(float(torch.nn.utils.get_total_norm(shards)))  # clipped as they were read

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = train_for("run", 3, *ONE, "--model.clip_norm", "0.25")
    assert norms == pytest.approx([0.25] * 3, rel=1e-4)
    assert min(measured(run, "grad_norm").values()) > 0.25


@alone
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(
    train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the initial ones: so this also shows that those are the same, bit for bit."""
    real = Pretraining.mean_loss
    monkeypatch.setattr(Pretraining, "mean_loss", lambda *of, **more: real(*of, **more) * float("nan"))
    saved = [checkpoint(train_for("plain", 3)), checkpoint(train_for("sharded", 3, *ONE, *MICRO))]
    monkeypatch.undo()
    assert_bitwise_equal(saved[0]["state_dict"], saved[1]["state_dict"])
    assert int(saved[1]["sinktrain"]["guard"]["_skipped"]) == 3
    assert float(saved[1]["optimizer_states"][0]["state"][0]["step"]) == 0


@alone
@pytest.mark.slow  # compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_layers_are_compiled_once_for_all_of_them(train_for: Callable[..., Path]) -> None:
    layers = ["--model.network.num_hidden_layers", "10"]  # torch gives up after 8 graphs of one function
    eager = train_for("eager", 6, *ONE, *layers)
    torch._dynamo.utils.counters.clear()
    compiled = train_for("compiled", 6, *ONE, *layers, "--model.compile", "true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # training, validation
    assert measured(compiled, "train/loss") == pytest.approx(measured(eager, "train/loss"), rel=1e-4)
    torch._dynamo.reset()


@alone
@pytest.mark.gpu
def test_a_step_on_cuda_waits_for_nothing_and_is_that_of_one_device(
    train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardedStepper.__call__

    def step(stepper: ShardedStepper, windows: torch.Tensor, learning_rate: float) -> None:
        is_warm = stepper.module.trainer.global_step >= 3  # compiled, and its communicators made
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
        try:
            real(stepper, windows, learning_rate)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ShardedStepper, "__call__", step)
    cuda = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    plain, sharded = train_for("plain", 12, *cuda), train_for("sharded", 12, *cuda, *ONE, *MICRO)
    expected, found = measured(plain, "train/loss"), measured(sharded, "train/loss")
    assert found == pytest.approx(expected, abs=2e-2)
    assert measured(train_for("sharded", 14, *cuda), "train/loss")[14] < found[1] - 1


# -- two processes --------------------------------------------------------------------------------

# Rows of MLPs that do not divide by two: the ranks' shards differ in size.
UNEVEN = ["--config", "sink", "--model.network.intermediate_size", "63"]


@pytest.mark.slow  # two processes import lightning one after the other
def test_one_process_then_two_then_one_equal_one_process(
    shards: Path, tmp_path: Path, train_for: Callable[..., Path]
) -> None:
    """Steps 1-6 on one process, 7-12 on two with micro-batches, 13-16 on one."""
    whole = train_for("whole", 16, *UNEVEN)
    parts = train_for("parts", 6, *UNEVEN)
    steps = ["--trainer.max_steps", "12", *MICRO]
    process = start(tiny_run(shards, parts, *CONSTANT, *UNEVEN, *TWO, *steps))
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert told.count("from step-00000006.ckpt") == 1, told  # said by rank 0 alone
    assert told.count("finished at step 12") == 1, told
    export(parts, tmp_path / "exported")  # checks its logits against the checkpoint's
    exported, trained = load_model(tmp_path / "exported"), load_model(parts)
    assert_bitwise_equal(dict(exported.state_dict()), dict(trained.state_dict()))
    assert_close(whole, train_for("parts", 16, *UNEVEN))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_process_stops_both_and_saves(
    rank: int, shards: Path, tmp_path: Path, train_for: Callable[..., Path]
) -> None:
    rare = ["--checkpoint.every_n_steps", "100000", "--trainer.val_check_interval", "100000"]
    steps = ["--trainer.max_steps", "100000", *rare]
    process = start(tiny_run(shards, tmp_path / "parts", *CONSTANT, *TWO, *steps))
    wait_for(20, tmp_path / "parts", process)
    os.kill(processes_of(process.pid)[rank], signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143, told
    assert told.count("stopped by SIGTERM and saved; the same command continues") == 1, told
    end = checkpoint(tmp_path / "parts")["global_step"] + 4
    assert_close(train_for("whole", end, *rare), train_for("parts", end, *rare))


SPOILED = """\
import sys

from sinktrain.cli import main
from sinktrain.training.module import Pretraining

mean_loss = Pretraining.mean_loss


def spoiled(module, windows, rows):
    is_spoiled = (module.trainer.global_step, module.trainer.global_rank) == (5, 1)
    return mean_loss(module, windows, rows) * (float("nan") if is_spoiled else 1.0)


Pretraining.mean_loss = spoiled
sys.exit(main(["fit", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_step_that_one_rank_spoils_is_skipped_on_both(
    shards: Path, tmp_path: Path, train_for: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spoiled.py").write_text(SPOILED)
    options = [*CONSTANT, *TWO, *MICRO, "--trainer.max_steps", "8"]
    command = [sys.executable, str(tmp_path / "spoiled.py"), *tiny_run(shards, tmp_path / "two", *options)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False)
    assert done.returncode == 0
    real = Pretraining.mean_loss

    def spoiled(module: Pretraining, windows: torch.Tensor, rows: int) -> torch.Tensor:
        return real(module, windows, rows) * (float("nan") if module.trainer.global_step == 5 else 1.0)

    monkeypatch.setattr(Pretraining, "mean_loss", spoiled)
    one = train_for("one", 8)
    assert measured(one, "skipped_steps") == {step: float(step >= 6) for step in range(1, 9)}
    assert measured(tmp_path / "two", "skipped_steps") == measured(one, "skipped_steps")
    expected, found = measured(one, "train/loss"), measured(tmp_path / "two", "train/loss")
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    for name, weight in checkpoint(one)["state_dict"].items():
        difference = (weight - checkpoint(tmp_path / "two")["state_dict"][name]).abs().max()
        assert difference < 1e-5, f"{name}: {difference:.1e}"
