"""What goes wrong around a run, and what it makes of it: full disks, damaged files, signals, bad losses."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import assert_bitwise_equal, assert_same_state, checkpoint, measured
from tiny_shards import tiny_run, write_shards

from sinktrain.cli import main
from sinktrain.errors import ModelError
from sinktrain.model.neox import GPTNeoX
from sinktrain.training import saving
from sinktrain.training.checkpoint_file import CheckpointFile, check_whole
from sinktrain.training.module import Pretraining
from sinktrain.training.run import LOCK, RunFolder
from sinktrain.training.saving import CheckpointSettings

Train = Callable[..., Path]
Told = pytest.CaptureFixture[str]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refused(arguments: list[str], told: Told) -> str:
    """The one line of a command that ends with exit code 2."""
    told.readouterr()
    assert main(["fit", *arguments]) == 2
    lines = [line for line in told.readouterr().err.splitlines() if line.startswith("sinktrain fit: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def whole(undisturbed: Path) -> Path:
    return undisturbed


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Has something happen behind the training step of that number, once."""

    def arrange(number: int, happens: Callable[[], None]) -> None:
        real = Pretraining.training_step

        def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
            real(module, windows, batch_idx)
            if module.trainer.global_step == number:
                monkeypatch.setattr(Pretraining, "training_step", real)
                happens()

        monkeypatch.setattr(Pretraining, "training_step", training_step)

    return arrange


# -- signals --------------------------------------------------------------------------------------


def test_sigusr1_saves_and_exits_with_138(
    shards: Path, tmp_path: Path, whole: Path, train: Train, after_step: Callable[..., Any]
) -> None:
    after_step(6, lambda: signal.raise_signal(signal.SIGUSR1))
    assert main(["fit", *tiny_run(shards, tmp_path / "parts")]) == 138
    assert checkpoint(tmp_path / "parts")["global_step"] == 6
    assert_same_state(whole, train("parts"))


# -- saving while training goes on ----------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written_of_the_state_before(
    train: Train, after_step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--checkpoint.keep", "null"]
    whole = train("whole", *options)
    real, is_at_6 = torch.save, threading.Event()

    def save(state: dict[str, Any], file: Any) -> None:
        assert is_at_6.wait(60)
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    after_step(6, is_at_6.set)
    parts = train("parts", *options)
    assert names(parts) == names(whole)
    for name in names(whole):
        assert_bitwise_equal(checkpoint(whole, name), checkpoint(parts, name))


def fail() -> None:
    raise RuntimeError("cut off")


@pytest.mark.parametrize(
    ("happens", "code", "last"),
    [
        pytest.param(lambda: None, 0, 12, marks=pytest.mark.slow),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, 6),
        (fail, 1, 4),
    ],
)
def test_a_command_ends_when_its_last_checkpoint_is_named(
    happens: Callable[[], None],
    code: int,
    last: int,
    shards: Path,
    tmp_path: Path,
    after_step: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = torch.save

    def save(state: dict[str, Any], file: Any) -> None:
        time.sleep(0.3)
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    after_step(5, happens)
    with pytest.raises(RuntimeError, match="cut off") if code == 1 else nullcontext():
        assert main(["fit", *tiny_run(shards, tmp_path / "run")]) == code
    assert RunFolder(tmp_path / "run").last.readlink() == Path(f"step-{last:08d}.ckpt")
    check_whole(RunFolder(tmp_path / "run").last)


def test_without_being_told_what_then_a_file_is_there_at_once(tmp_path: Path) -> None:
    """As other callbacks expect it that save, such as Lightning's ModelCheckpoint."""
    CheckpointFile().save_checkpoint({"weight": torch.ones(3)}, tmp_path / "own.ckpt")
    check_whole(tmp_path / "own.ckpt")


# -- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Lets the kernel refuse to write further than so many bytes into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_checkpoint_before_and_the_run_continues(
    shards: Path,
    tmp_path: Path,
    whole: Path,
    train: Train,
    after_step: Callable[..., Any],
    limit_files: Callable[[int], None],
    capsys: Told,
) -> None:
    after_step(6, lambda: limit_files(100_000))
    line = refused(tiny_run(shards, tmp_path / "parts"), capsys)
    assert "step-00000008.ckpt could not be written: File too large; it takes 0.6 MB and " in line
    assert line.endswith(" are free; free some space: the same command continues from step-00000004")
    assert names(tmp_path / "parts") == ["last.ckpt", "step-00000004.ckpt"]
    limit_files(resource.RLIM_INFINITY)
    assert_same_state(whole, train("parts"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, which takes one checkpoint of a tiny run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_early_and_again_when_it_is_full(
    shards: Path, small_disk: Path, tmp_path: Path, capsys: Told
) -> None:
    config = tmp_path / "run"  # beside which the config is written: not on the small disk
    arguments = [
        str(small_disk / "run") if word == str(config) else word for word in tiny_run(shards, config)
    ]
    assert main(["fit", *arguments]) == 2
    early, late = (line for line in capsys.readouterr().err.splitlines() if "free some space" in line)
    assert early.endswith("GB are free; free some space, or use a smaller --checkpoint.keep")
    assert "step-00000008.ckpt could not be written: No space left on device; it takes 0.6 MB and 0." in late
    assert names(small_disk / "run") == ["last.ckpt", "step-00000004.ckpt"]
    check_whole(small_disk / "run" / "checkpoints" / "last.ckpt")


def test_space_is_reckoned_for_what_lies_side_by_side() -> None:
    assert CheckpointSettings(every_n_steps=10, keep=2).most_at_once(100) == 3
    assert CheckpointSettings(every_n_steps=10, keep=2, log_spaced=True).most_at_once(100) == 8 + 2 + 1
    assert CheckpointSettings(every_n_steps=10, keep=None).most_at_once(105) == 10 + 1


# -- damage ---------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    """Change one bit in the middle of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: Callable[[Path], None], whole: Path, tmp_path: Path, train: Train, capsys: Told
) -> None:
    run = tmp_path / "parts"
    shutil.copytree(whole, run, symlinks=True)
    newest = run / "checkpoints" / "step-00000012.ckpt"
    damage(newest)
    capsys.readouterr()
    train("parts")
    told = capsys.readouterr().err
    how = "is damaged: " if newest.with_name("step-00000012.ckpt.damaged").exists() else "which is gone"
    assert told.count("continuing from the one before") == 1
    assert how in told
    assert "from step-00000008.ckpt\n" in told
    assert_same_state(whole, run)
    assert measured(whole, "train/loss") == measured(run, "train/loss")
    assert {path.suffix for path in (run / "checkpoints").iterdir()} <= {".ckpt", ".damaged"}


def test_a_changed_byte_of_any_record_is_found(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    shutil.copyfile(whole / "checkpoints" / "last.ckpt", path)
    check_whole(path)
    content = path.read_bytes()
    draw = random.Random(0)
    weights = list(torch.load(path, weights_only=True)["state_dict"].values())
    for weight in draw.sample(weights, 6):
        place = content.index(weight.flatten().numpy().tobytes()) + draw.randrange(weight.nbytes)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ModelError, match=r"last.ckpt is damaged: Bad CRC-32"):
            check_whole(path)


def test_a_run_without_a_whole_checkpoint_is_refused(
    shards: Path, whole: Path, tmp_path: Path, capsys: Told
) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        truncate(path)
    line = refused(tiny_run(shards, tmp_path / "run"), capsys)
    assert "last.ckpt is damaged: File is not a zip file; " in line
    assert "step-00000008.ckpt is damaged: File is not a zip file; pass --resume PATH, or choose" in line


def test_a_damaged_checkpoint_that_is_named_is_refused(
    shards: Path, whole: Path, tmp_path: Path, capsys: Told
) -> None:
    named = tmp_path / "named.ckpt"
    shutil.copyfile(whole / "checkpoints" / "last.ckpt", named)
    flip(named)
    line = refused(tiny_run(shards, tmp_path / "new", "--resume", str(named)), capsys)
    assert f"{named} is damaged: Bad CRC-32 for file" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("damage", "how"), [(truncate, "bytes, not"), (Path.unlink, "the shard is missing")])
def test_a_damaged_shard_is_one_line(
    damage: Callable[[Path], None], how: str, tmp_path: Path, train: Train, capsys: Told
) -> None:
    write_shards(tmp_path / "own")
    train("run", "--data.path", str(tmp_path / "own"))
    damage(tmp_path / "own" / "tokens-train-00000.bin")
    options = ["--trainer.max_steps", "14"]
    assert how in refused(tiny_run(tmp_path / "own", tmp_path / "run", *options), capsys)


def test_held_out_loss_of_a_checkpoints_step_is_not_lost(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning continues behind the validation of the step that a checkpoint was saved at.

    So the loss was missing where a run was killed between the two.
    """
    options = ["--checkpoint.every_n_steps", "5", "--checkpoint.keep", "null"]
    whole = train("whole", *options)
    real = Pretraining.validation_step

    def validation_step(module: Pretraining, batch: Any, batch_idx: int) -> None:
        if module.trainer.global_step == 10:
            raise RuntimeError("cut off")
        real(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "validation_step", validation_step)
        with pytest.raises(RuntimeError, match="cut off"):
            train("parts", *options)
    parts = train("parts", *options)
    assert measured(whole, "val/loss") == measured(parts, "val/loss")
    assert_same_state(whole, parts)


def test_cut_off_between_a_checkpoint_and_its_name_the_one_before_counts(
    whole: Path, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    real = saving.name_last

    def name_last(path: Path) -> None:
        if path.name == "step-00000008.ckpt":
            raise RuntimeError("cut off")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "name_last", name_last)
        with pytest.raises(RuntimeError, match="cut off"):
            train("parts")
    capsys.readouterr()
    parts = train("parts")
    assert "from step-00000004.ckpt" in capsys.readouterr().err
    assert_same_state(whole, parts)
    assert names(parts) == ["last.ckpt", "step-00000008.ckpt", "step-00000012.ckpt"]


# -- two on one folder ----------------------------------------------------------------------------


def test_a_second_process_on_a_run_folder_is_refused(
    shards: Path, whole: Path, tmp_path: Path, train: Train, capsys: Told
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    with RunFolder(run).locked():
        line = refused(tiny_run(shards, run, "--trainer.max_steps", "14"), capsys)
        assert f"--run {run}: process {os.getpid()} on " in line
        assert line.endswith(" trains there; wait for it, or choose another --run")
    assert not (run / LOCK).exists()
    assert checkpoint(train("run", "--trainer.max_steps", "14"))["global_step"] == 14


def test_a_folder_left_by_a_process_that_was_killed_at_once_is_free(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).write_text("process 1 on a host")
    (run / ".manifest.json.tmp-1").write_text("{")
    assert checkpoint(train("run"))["global_step"] == 12
    assert not list(run.glob(".*"))


# -- losses ---------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], Any]:
    """Makes the network's loss NaN in these steps (the first is 1)."""

    def poison(steps: range) -> Any:
        real, module_step = GPTNeoX.forward, Pretraining.training_step
        current = [0]

        def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
            current[0] = module.trainer.global_step + 1
            module_step(module, windows, batch_idx)

        def forward(network: GPTNeoX, *arguments: Any, **options: Any) -> torch.Tensor:
            result: torch.Tensor = real(network, *arguments, **options)
            return result * float("nan") if network.training and current[0] in steps else result

        monkeypatch.setattr(Pretraining, "training_step", training_step)
        monkeypatch.setattr(GPTNeoX, "forward", forward)

    return poison


def test_steps_whose_loss_is_not_finite_are_skipped_and_counted(
    train: Train, poisoned: Callable[[range], Any]
) -> None:
    poisoned(range(5, 8))
    run = train("run", "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "null")
    skipped = measured(run, "skipped_steps")
    assert [skipped[step] for step in range(1, 13)] == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3]
    before, bad, after = (checkpoint(run, f"step-{step:08d}.ckpt") for step in (4, 7, 8))
    assert_bitwise_equal(before["state_dict"], bad["state_dict"])
    weight = "network.gpt_neox.embed_in.weight"
    assert not torch.equal(bad["state_dict"][weight], after["state_dict"][weight])


def test_a_run_that_only_skips_stops_with_the_weights_from_before(
    shards: Path, whole: Path, tmp_path: Path, poisoned: Callable[[range], Any], capsys: Told
) -> None:
    poisoned(range(9, 13))
    line = refused(tiny_run(shards, tmp_path / "run", "--model.max_skipped_steps", "4"), capsys)
    assert "steps 9 to 12 were all skipped" in line
    assert "the weights are those after step 8, and the same command continues from step-00000012" in line
    assert "try a lower --model.learning_rate" in line
    before, stopped = checkpoint(whole, "step-00000008.ckpt"), checkpoint(tmp_path / "run")
    assert stopped["global_step"] == 12
    assert_bitwise_equal(before["state_dict"], stopped["state_dict"])
    states = [saved["optimizer_states"][0]["state"] for saved in (before, stopped)]
    assert_bitwise_equal(states[0], states[1])


# -- kills ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_left_alone() -> None:
    script = Path(__file__).parents[1] / "scripts" / "kill-campaign"
    done = subprocess.run(
        [sys.executable, script, "--kills", "3", "--seed", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the end is the same, bit for bit" in done.stdout
