"""``sinktrain validate``: a run folder is enough, and whatever else is typed is told what to type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sinktrain.cli import main

Validate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def validate(capsys: pytest.CaptureFixture[str]) -> Validate:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["validate", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def trained(undisturbed: Path) -> Path:
    """A run folder with the checkpoints of steps 8 and 12."""
    return undisturbed


def named(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def loss_of(said: tuple[int, str, str]) -> float:
    code, out, err = said
    assert (code, err) == (0, "")
    loss: float = json.loads(out)["val/loss"]
    assert out == json.dumps({"val/loss": loss}, indent=2) + "\n"
    return loss


def test_a_run_folder_is_scored_by_its_newest_checkpoint(trained: Path, validate: Validate) -> None:
    finished = json.loads((trained / "manifest.json").read_text())["val_loss_nats"]
    loss = loss_of(validate(trained, "--json"))
    assert loss == pytest.approx(finished, rel=1e-6)
    assert validate(trained) == (0, f"held-out loss {loss:.4f} nats\n", "")
    config = ("--config", trained / "config.yaml", "--ckpt_path", trained / "checkpoints" / "last.ckpt")
    assert loss_of(validate(*config, "--json")) == loss


def test_an_earlier_checkpoint_has_the_loss_of_its_step(trained: Path, validate: Validate) -> None:
    before, after = (loss_of(validate(named(trained, step), "--json")) for step in (8, 12))
    assert before > after + 0.1


def test_options_of_fit_are_taken_and_shards_may_have_moved(
    trained: Path, shards: Path, tmp_path: Path, validate: Validate
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained, run, symlinks=True)
    shutil.copytree(shards, moved)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(shards), str(tmp_path / "gone")))
    code, _, err = validate(run)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path / 'gone'}: no prepared shards here" in err
    assert loss_of(validate(run, "--json", "--data.path", moved)) == loss_of(validate(trained, "--json"))


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(
    trained: Path, tmp_path: Path, validate: Validate
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    named(run, 12).write_bytes(named(run, 12).read_bytes()[:-1000])
    code, out, err = validate(run, "--json")
    assert (code, err.count("\n")) == (0, 1)
    assert "last.ckpt is damaged" in err
    assert err.endswith("; scoring step-00000008.ckpt, the one before\n")
    assert json.loads(out)["val/loss"] == loss_of(validate(named(trained, 8), "--json"))


CONFIG = "--config {run}/config.yaml"
BOTH = "--config FILE --ckpt_path PATH"
NO_CONFIG = "--config is missing; pass the config.yaml of the run, or instead of both options type sinktrain"

MISTAKES = {
    "": f"say what to score: sinktrain validate RUN, or {BOTH}",
    "--json": "say what to score: sinktrain validate RUN",
    "{run}s": '{run}s: no such run folder or checkpoint; did you mean "run"?',
    "{run}/metrics.csv": "{run}/metrics.csv is neither a run folder nor a .ckpt; see sinktrain validate",
    "{run}/checkpoints": "{run}/checkpoints is of no run: there is no {run}/checkpoints/config.yaml; "
    f"type sinktrain validate {BOTH}",
    "--ckpt_path {run}/last.ckpt": f"{NO_CONFIG} validate {{run}}/last.ckpt",
    "--data.path {run}": f"{NO_CONFIG} validate RUN",
    "--config quickstart --ckpt_path={run}": "--ckpt_path {run} is a folder; name a checkpoint, or if that "
    "is a run folder type sinktrain validate {run}",
    CONFIG: "--ckpt_path is missing",
    f"{CONFIG} --ckpt_path none.ckpt": "none.ckpt: there is no such checkpoint",
    "--config quickstrt": 'no shipped config of that name; did you mean "quickstart"?',
    "{run} --model.sink.kind token": "was made with model.sink.kind none, not token",
    "{run} --model.learnin_rate 1": '"model.learnin_rate"; did you mean "model.learning_rate"?',
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_told_what_to_type(typed: str, trained: Path, validate: Validate) -> None:
    code, out, err = validate(*typed.format(run=trained).split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("sinktrain validate: ")
    assert MISTAKES[typed].format(run=trained) in err


def test_a_run_without_a_whole_checkpoint_says_what_is_wrong(
    trained: Path, tmp_path: Path, validate: Validate
) -> None:
    shutil.copy(trained / "config.yaml", tmp_path)
    told = f"sinktrain validate: {tmp_path} has no whole checkpoint: "
    assert validate(tmp_path)[::2] == (2, f"{told}{tmp_path}/checkpoints holds none\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("torn")
    assert validate(tmp_path)[2].startswith(f"{told}{tmp_path}/checkpoints/last.ckpt is damaged: ")


@pytest.mark.parametrize("typed", ["--help", "-h", "--config quickstart --help"])
def test_help_is_our_own_wherever_it_is_asked_for(typed: str, validate: Validate) -> None:
    """Behind another option it was that of jsonargparse: 600 lines that name neither RUN nor an example."""
    code, out, err = validate(*typed.split())
    assert (code, err) == (0, "")
    assert out.startswith("usage: sinktrain validate RUN [options]\n")
    assert len(out.splitlines()) < 24
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.slow
def test_two_processes_print_one_loss(trained: Path, validate: Validate) -> None:
    alone = loss_of(validate(trained, "--json"))
    command = [str(Path(sys.executable).with_name("sinktrain")), "validate", str(trained), "--json"]
    command += ["--config", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val/loss"] == pytest.approx(alone, rel=1e-5)
