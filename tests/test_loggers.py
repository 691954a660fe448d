"""Loggers: the settings and the code once, no step twice however often a run starts, the model if asked."""

from __future__ import annotations

import importlib.machinery
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import wandb as lightnings_wandb
from test_fit import measured
from tiny_shards import tiny_run

import sinktrain
from sinktrain.cli import main
from sinktrain.model.checkpoints import load_model
from sinktrain.training import loggers
from sinktrain.training.fit import _changed_lines
from sinktrain.training.loggers import code_version
from sinktrain.training.module import Pretraining
from sinktrain.training.settings import TrainingCLI

WANDB = ("--config", "wandb")
UPLOADED = (*WANDB, "--trainer.logger.init_args.log_model", "true")


# -- TensorBoard ----------------------------------------------------------------------------------


@pytest.fixture
def cut_off(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A run with TensorBoard that ends like a killed one in the step after this one."""

    def run(after_step: int) -> None:
        real = Pretraining.training_step

        def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
            if module.trainer.global_step == after_step:
                raise RuntimeError("cut off")
            real(module, windows, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(Pretraining, "training_step", training_step)
            with pytest.raises(RuntimeError, match="cut off"):
                train("run", "--config", "tensorboard")

    return run


def test_a_run_cut_off_twice_leaves_no_step_twice_and_none_out(
    train: Callable[..., Path], cut_off: Callable[..., None]
) -> None:
    """Steps 1 to 2, from the start again 1 to 7, and from the checkpoint of step 4 on 5 to 12."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cut_off(2)
    cut_off(7)
    run = train("run", "--config", "tensorboard")
    assert len(list((run / "tensorboard").glob("events.*"))) == 3
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("train/loss", "val/loss", "lr", "eta_s"):
        points = {event.step: event.value for event in events.Scalars(name)}
        assert len(points) == len(events.Scalars(name))
        assert list(points) == list(measured(run, name))
        assert points == pytest.approx(measured(run, name))
    assert "hp_metric" not in events.Tags()["scalars"]
    told = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for text in (b"model.learning_rate", b"code.version", sinktrain.__version__.encode()):
        assert text in told


# -- Weights & Biases -----------------------------------------------------------------------------


class StandIn(ModuleType):
    """Keeps what a run is given, under wandb's names."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run = None
        self.id = ""
        self.starts: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.points: list[dict[str, float]] = []
        self.uploaded: list[Artifact] = []

    def init(self, **settings: Any) -> Run:
        self.id = settings["id"]
        self.starts.append(settings)
        return Run(self)


class Run:
    offline, url = False, "https://wandb.ai/lab/sinktrain/runs/1"

    def __init__(self, wandb: StandIn) -> None:
        self.wandb = wandb
        self.id = wandb.id
        self.config = self

    def update(self, config: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change
        self.wandb.config |= config

    def define_metric(self, *_: str, **__: Any) -> None:
        """Which metric stands on the x axis."""

    def log(self, metrics: dict[str, float]) -> None:
        self.wandb.points.append(metrics)

    def log_artifact(self, artifact: Artifact) -> None:
        self.wandb.uploaded.append(artifact)


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type
        self.files: dict[str, bytes] = {}

    def add_file(self, path: str) -> None:
        self.files[Path(path).name] = Path(path).read_bytes()

    def new_file(self, name: str, mode: str) -> Any:
        assert mode == "wb"
        files = self.files

        class Written(io.BytesIO):
            def close(self) -> None:
                files[name] = self.getvalue()
                super().close()

        return Written()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    package, inner, run = StandIn(), ModuleType("wandb.sdk.lib"), ModuleType("wandb.wandb_run")
    for module, names in (
        (package, {"Artifact": Artifact}),
        (inner, {"RunDisabled": Run}),
        (run, {"Run": Run}),
    ):
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "wandb.sdk", ModuleType("wandb.sdk"))
    monkeypatch.setattr(lightnings_wandb, "_WANDB_AVAILABLE", True)
    return package


def test_wandb_gets_settings_code_and_metrics_and_a_continued_run_is_the_same_one(
    train: Callable[..., Path], wandb: StandIn
) -> None:
    train("run", *WANDB, "--trainer.max_steps", "6")
    run = train("run", *WANDB, "--trainer.max_steps", "8", "--model.warmup_steps", "1")
    first, second = wandb.starts
    assert first == second
    assert (first["project"], first["name"], first["dir"]) == ("sinktrain", "run", str(run))
    assert (len(first["id"]), first["resume"]) == (12, "allow")
    assert wandb.config["model"]["learning_rate"] == 0.01
    assert wandb.config["model"]["warmup_steps"] == 1  # the newest start's
    assert wandb.config["code"] == code_version()
    assert "logger" not in wandb.config["trainer"]
    assert json.loads((run / "manifest.json").read_text())["wandb_url"] == Run.url
    steps = [point["trainer/global_step"] for point in wandb.points if "train/loss" in point]
    assert steps == list(range(1, 9))
    assert not wandb.uploaded


def test_wandb_gets_a_model_that_loads_when_asked(
    train: Callable[..., Path], wandb: StandIn, tmp_path: Path
) -> None:
    run = train("run", *UPLOADED)
    (artifact,) = wandb.uploaded
    assert (artifact.name, artifact.type) == (f"model-{wandb.id}", "model")
    for name, content in artifact.files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    assert set(artifact.files) == {"checkpoints/last.ckpt", "tokenizer.json"}
    saved = (run / "checkpoints" / "last.ckpt").stat().st_size
    assert len(artifact.files["checkpoints/last.ckpt"]) < 0.4 * saved  # no moments of the optimizer
    torch.testing.assert_close(
        load_model(tmp_path / "there").state_dict(), load_model(run).state_dict(), rtol=0, atol=0
    )


@pytest.mark.usefixtures("wandb")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--trainer.logger.init_args.log_model", "all"),
            "trainer.logger: log_model all is not supported; use true (the last one)",
        ),
        (
            ("--trainer.logger.init_args.log_model=true", "--trainer.logger.init_args.offline=true"),
            "trainer.logger: log_model and offline do not go together; "
            "leave offline out and set WANDB_MODE=offline, and `wandb sync` uploads both",
        ),
    ],
)
def test_what_wandb_cannot_be_asked_is_one_line(
    options: tuple[str, ...], told: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *WANDB, *options)]) == 2
    assert capsys.readouterr().err == f"sinktrain fit: {told}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # wandb's own service takes some seconds to start
def test_the_real_wandb_takes_settings_and_a_model(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train("run", *UPLOADED)
    wandb.finish()  # as the end of the process does
    (written,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for text in (b"learning_rate", sinktrain.__version__.encode(), b"checkpoints/last.ckpt", b"train/loss"):
        assert text in content


# -- what is told ---------------------------------------------------------------------------------


def test_settings_for_loggers_are_all_but_the_loggers_own(shards: Path, tmp_path: Path) -> None:
    """Theirs may hold keys to their services."""
    options = ["--config", "tensorboard", "--trainer.logger.init_args.prefix", "a-key"]
    cli = TrainingCLI(tiny_run(shards, tmp_path / "run", *options))
    told = cli.logged_settings()
    assert "a-key" in cli.dump()
    assert "a-key" not in str(told)
    assert told["model"]["network"]["hidden_size"] == 32
    assert told["model"]["init_from"] is None


def test_the_code_is_told_by_its_version_and_in_a_repository_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sinktrain" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(loggers.sinktrain, "__file__", str(package))
    assert code_version() == {"version": sinktrain.__version__}
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # of a hook that runs the tests
        monkeypatch.delenv(name)

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tmp_path), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c")
    commit = git("rev-parse", "HEAD")
    assert code_version() == {"version": sinktrain.__version__, "commit": commit}
    package.write_text("changed = True")
    assert code_version()["commit"] == f"{commit}-dirty"


def test_another_class_is_one_changed_line(shards: Path, tmp_path: Path) -> None:
    """Switching DDP on once printed a line for each of its ten settings."""
    before, after, tuned = (
        TrainingCLI(tiny_run(shards, tmp_path / "run", *options)).dump()
        for options in (
            (),
            ("--config", "ddp", "--config", "tensorboard"),
            ("--config", "ddp", "--trainer.strategy.init_args.gradient_as_bucket_view", "false"),
        )
    )
    assert _changed_lines(before, before) == []
    assert _changed_lines(before, after) == [
        "trainer.strategy auto -> DDPStrategy",
        "trainer.devices 1 -> auto",
        "trainer.logger False -> TensorBoardLogger",
    ]
    assert _changed_lines(after, tuned) == [
        "trainer.strategy.init_args.gradient_as_bucket_view True -> False",
        "trainer.logger TensorBoardLogger -> False",
    ]


def test_jsonargparse_is_used_by_its_newest_names(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        TrainingCLI(tiny_run(shards, tmp_path / "run")).dump()
    assert [str(warning.message) for warning in told if "deprecated in v4" in str(warning.message)] == []
