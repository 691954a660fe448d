"""Which checkpoints a run leaves: rolling ones, and those kept for good at Pythia's steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from grids import by_default
from test_fit import assert_bitwise_equal, assert_same_state, checkpoint, measured
from tiny_shards import tiny_run

from sinktrain.model.checkpoints import load_model
from sinktrain.model.init import initialize
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.saving import CheckpointSettings

LOG_SPACED = ["--checkpoint.log_spaced", "true"]


@pytest.fixture(scope="module")
def log_spaced(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing happened to; not to be changed."""
    from sinktrain.training.fit import fit

    run = tmp_path_factory.mktemp("log-spaced") / "run"
    fit(tiny_run(shards, run, *LOG_SPACED))
    return run


def kept(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_pythias_154_checkpoints() -> None:
    settings = CheckpointSettings(1000, 1, log_spaced=True, keep_every_n_steps=1000)
    saved = [step for step in range(143_001) if settings.is_due(step)]
    assert saved == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 143_001, 1000)]
    assert len(saved) == 154
    assert all(settings.is_for_good(step) for step in saved)


def test_without_being_asked_for_none_is_kept_for_good() -> None:
    settings = CheckpointSettings(4)
    assert [step for step in range(1, 13) if settings.is_due(step)] == [4, 8, 12]
    assert not any(settings.is_for_good(step) for step in range(13))


def test_log_spaced_steps_stay_and_one_rolling_checkpoint_beside_them(train: Callable[..., Path]) -> None:
    run = train("run", *LOG_SPACED, "--checkpoint.every_n_steps", "3", "--checkpoint.keep", "1")
    assert kept(run) == [0, 1, 2, 4, 8, 12]
    assert (run / "checkpoints" / "last.ckpt").readlink() == Path("step-00000012.ckpt")


def test_every_kth_step_is_saved_and_stays(train: Callable[..., Path]) -> None:
    """Also where it is no multiple of ``every_n_steps``; ``keep`` counts the others alone."""
    run = train("run", "--checkpoint.keep_every_n_steps", "5", "--checkpoint.keep", "2")
    assert kept(run) == [5, 8, 10, 12]


def test_files_that_are_no_checkpoints_of_the_run_are_left_alone(train: Callable[..., Path]) -> None:
    """A copy under a longer name was once deleted as an old checkpoint."""
    run = train("run", "--trainer.max_steps", "4", "--model.warmup_steps", "1")
    best = run / "checkpoints" / "step-00000004-best.ckpt"
    best.write_bytes(b"a copy")
    train("run", "--trainer.max_steps", "8", "--model.warmup_steps", "1")
    assert best.read_bytes() == b"a copy"


def test_step_0_is_the_model_before_training(log_spaced: Path) -> None:
    at_0 = checkpoint(log_spaced, "step-00000000.ckpt")
    assert (at_0["global_step"], at_0["sinktrain"]["tokens_seen"]) == (0, 0)
    assert at_0["optimizer_states"][0]["state"] == {}
    model = load_model(log_spaced / "checkpoints" / "step-00000000.ckpt")
    fresh = GPTNeoX(model.config)
    initialize(fresh, 1234)
    assert_bitwise_equal(dict(model.state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("step", by_default([1], slow=[0, 8]))
def test_a_run_continues_from_each_of_them_bit_for_bit(
    step: int, log_spaced: Path, train: Callable[..., Path]
) -> None:
    old = log_spaced / "checkpoints" / f"step-{step:08d}.ckpt"
    parts = train("parts", *LOG_SPACED, "--resume", str(old))
    assert_same_state(log_spaced, parts)
    losses = measured(log_spaced, "train/loss")
    assert measured(parts, "train/loss") == {at: loss for at, loss in losses.items() if at > step}
