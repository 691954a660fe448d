"""Training: the step is the right one, a run leaves what it should, and continues bit for bit."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_shards import SEQ_LEN, tiny_run
from torch.nn import functional as F

from sinktrain.cli import main
from sinktrain.data.datamodule import WindowData
from sinktrain.errors import ConfigError
from sinktrain.model.checkpoints import load_model
from sinktrain.model.config import PYTHIA, NetworkConfig, SinkConfig
from sinktrain.training import loggers
from sinktrain.training.configs import config_folder, default_run, find_config
from sinktrain.training.metrics_table import MetricsTable, curves
from sinktrain.training.module import Pretraining
from sinktrain.training.recipe import arm_name
from sinktrain.training.saving import LAST
from sinktrain.training.settings import TrainingCLI
from sinktrain.training.step import Stepper


def checkpoint(run: Path, name: str = LAST) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / name, weights_only=True)
    return loaded


def assert_bitwise_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(x, y, f"{where}[{number}]")
    else:
        assert a == b, where


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, optimizer, place in the data and random states: everything that decides what comes next."""
    first, second = checkpoint(a), checkpoint(b)
    for key in ("state_dict", "optimizer_states", "WindowData", "sinktrain", "global_step"):
        assert_bitwise_equal(first[key], second[key], key)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def measured(run: Path, name: str) -> dict[int, float]:
    found = [(int(row["step"]), float(row[name])) for row in rows(run) if row[name]]
    assert len({step for step, _ in found}) == len(found), "a step was measured twice"
    return dict(found)


# -- the step -------------------------------------------------------------------------------------


def module_of(
    shards: Path, num_sinks: int, micro_batch: int | None = None, score_sink: bool = True
) -> Pretraining:
    """A module with its network and data, as a trainer would hand them to it."""
    data = WindowData(str(shards), SEQ_LEN, global_batch=8, micro_batch=micro_batch, score_sink=score_sink)
    sink = SinkConfig("token", num_sinks) if num_sinks else SinkConfig()
    module = Pretraining(NetworkConfig(32, 2, 2), sink, warmup_steps=0)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(
        datamodule=data, world_size=1, global_step=0, max_steps=10, strategy=strategy
    )
    data.trainer = module._trainer = trainer
    module.configure_model()
    return module


def one_step(module: Pretraining, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Loss of one training step's share of a batch, whose gradient it leaves on the parameters."""
    monkeypatch.setattr(module, "manual_backward", torch.Tensor.backward)
    return float(Stepper(module).accumulate(windows))


def random_windows() -> torch.Tensor:
    return torch.randint(0, 50, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    num_sinks: int, micro_batch: int, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (module_of(shards, num_sinks, size) for size in (None, micro_batch))
    losses = [one_step(module, random_windows(), monkeypatch) for module in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        difference = (a.grad - b.grad).abs().max() / a.grad.abs().max()
        assert difference < 2e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("score_sink", [True, False])
@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_loss_is_the_mean_over_the_targets_that_are_scored(
    num_sinks: int, score_sink: bool, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, windows = module_of(shards, num_sinks, 2, score_sink), random_windows()
    assert module.network is not None
    sinks = torch.tensor(module.network.sink_ids, dtype=torch.int64).expand(8, -1)
    stream = torch.cat((sinks, windows), dim=1)
    with torch.no_grad():
        logits = module.network(stream[:, :SEQ_LEN])
    first_scored = num_sinks - 1 if score_sink and num_sinks else num_sinks
    losses = [
        float(F.cross_entropy(logits[row, position], stream[row, position + 1]))
        for row in range(8)
        for position in range(first_scored, SEQ_LEN)
    ]
    assert one_step(module, windows, monkeypatch) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_arms_begin_with_the_same_weights(shards: Path) -> None:
    vanilla, sink = (module_of(shards, num_sinks).state_dict() for num_sinks in (0, 1))
    assert_bitwise_equal(vanilla, sink)


def test_arm_names() -> None:
    sinks = [SinkConfig(), SinkConfig("token"), SinkConfig("token", 2)]
    assert [arm_name(sink) for sink in sinks] == ["vanilla", "token", "token-2"]


# -- a run ----------------------------------------------------------------------------------------


def test_losses_fall_and_held_out_loss_is_logged_at_the_last_step_too(train: Callable[..., Path]) -> None:
    run = train("run", "--trainer.max_steps", "32")
    loss, held_out = measured(run, "train/loss"), measured(run, "val/loss")
    assert list(loss) == list(range(1, 33))
    assert list(held_out) == [5, 10, 15, 20, 25, 30, 32]
    assert loss[1] > 5.5
    assert loss[32] < 3
    assert held_out[32] < 3
    steps = range(1, 33)
    assert measured(run, "tokens_seen") == {step: step * 8 * SEQ_LEN for step in steps}
    assert measured(run, "lr")[1] == pytest.approx(0.01 / 3)
    assert all(value > 0 for value in measured(run, "grad_norm").values())
    assert all(value > 0 for value in measured(run, "tokens_per_s").values())
    assert all(0 <= value < 1 for value in measured(run, "data_wait").values())
    assert not measured(run, "mfu")  # the CPU's peak is not known


def test_validation_at_the_last_step_happens_once(train: Callable[..., Path]) -> None:
    assert list(measured(train("run", "--trainer.max_steps", "10"), "val/loss")) == [5, 10]


def test_held_out_loss_equals_the_loss_by_hand(train: Callable[..., Path], shards: Path) -> None:
    """On t[1] to t[seq - 8], whatever the arm: the mean over all of them, not of batches' means."""
    run = train("run", "--config", "sink", "--data.micro_batch", "4")
    model = load_model(run)
    data = WindowData(str(shards), SEQ_LEN, val_windows=10)
    losses = []
    for windows, is_real in data.val_dataloader():
        for row in windows[is_real]:
            stream = torch.cat((torch.tensor(model.sink_ids), row))
            logits = model(stream[None, :SEQ_LEN])[0]
            positions = range(1, 1 + SEQ_LEN - 8)
            losses += [float(F.cross_entropy(logits[p], stream[p + 1])) for p in positions]
    assert len(losses) == 10 * (SEQ_LEN - 8)
    assert measured(run, "val/loss")[12] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_sinks_are_trained_and_carried_in_the_checkpoint(train: Callable[..., Path]) -> None:
    saved = checkpoint(train("run", "--config", "sink", "--model.sink.count", "2"))
    assert saved["sinktrain"]["model"]["sink"] == {"kind": "token", "count": 2, "token_ids": [265, 266]}
    assert saved["sinktrain"]["arm"] == "token-2"
    assert saved["sinktrain"]["samples_consumed"] == 12 * 8


def test_init_from_starts_with_the_weights_of_a_model(undisturbed: Path, train: Callable[..., Path]) -> None:
    second = train("second", "--model.init_from", str(undisturbed), "--trainer.max_steps", "5")
    assert measured(second, "train/loss")[1] < 4  # a fresh one begins near 6


def test_every_checkpoint_is_kept_when_asked(train: Callable[..., Path]) -> None:
    run = train("run", "--checkpoint.keep", "null")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000004.ckpt", "step-00000008.ckpt", "step-00000012.ckpt"]


def test_going_back_sets_later_checkpoints_aside_and_the_same_command_goes_on(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """``keep: 1`` once counted the newest by number, and so deleted what ``last.ckpt`` had just named."""
    run = train("run", "--checkpoint.keep", "null")
    old = str(run / "checkpoints" / "step-00000004.ckpt")
    shorter = ["--trainer.max_steps", "6", "--model.warmup_steps", "1"]
    train("run", "--resume", old, "--checkpoint.keep", "1", *shorter)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000006.ckpt", "step-00000008.ckpt.left", "step-00000012.ckpt.left"]
    assert checkpoint(run)["global_step"] == 6
    train("run", "--resume", old, "--checkpoint.keep", "1", *shorter)  # though that one is gone by now
    assert "finished already" in capsys.readouterr().err
    train("run", "--resume", old, "--trainer.max_steps", "9", "--model.warmup_steps", "1")
    assert "from step-00000006.ckpt" in capsys.readouterr().err
    assert checkpoint(run)["global_step"] == 9
    assert list(measured(run, "train/loss")) == list(range(1, 10))


def test_a_checkpoint_of_another_run_is_gone_back_to_once(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = train("first", "--checkpoint.keep", "null")
    start = ["--resume", str(first / "checkpoints" / "step-00000004.ckpt"), "--model.warmup_steps", "1"]
    train("second", *start, "--trainer.max_steps", "8")
    train("second", *start, "--trainer.max_steps", "10")
    told = capsys.readouterr().err
    assert "second: vanilla, 0.1m parameters, from step-00000004.ckpt" in told
    assert "second: vanilla, 0.1m parameters, from step-00000008.ckpt" in told


def test_a_run_that_lost_its_checkpoints_says_so_and_starts_anew(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("run")
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    train("run")
    assert "its metrics.csv reached step 12 and begins anew: no checkpoint is left" in capsys.readouterr().err
    assert list(measured(run, "train/loss")) == list(range(1, 13))


def test_no_validation_when_it_is_off(train: Callable[..., Path]) -> None:
    run = train("run", "--trainer.limit_val_batches", "0")
    assert not measured(run, "val/loss")


def test_ending_early_is_not_finishing(train: Callable[..., Path]) -> None:
    run = train("run", "--trainer.max_time", "00:00:00:00", "--trainer.max_steps", "100000")
    manifest = yaml.safe_load((run / "manifest.json").read_text())
    assert not manifest["is_finished"]


# -- going on -------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run cut off by an exception after a step, in place of a kill: nothing saved for the occasion."""

    def run(name: str, at_step: int, *options: str) -> Path:
        real = Pretraining.training_step

        def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
            if module.trainer.global_step == at_step:
                raise RuntimeError("cut off")
            real(module, windows, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(Pretraining, "training_step", training_step)
            with pytest.raises(RuntimeError, match="cut off"):
                train(name, *options)
        return train(name, *options)

    return run


@pytest.mark.parametrize(
    "options",
    [pytest.param([], marks=pytest.mark.slow), ["--config", "sink", "--data.micro_batch", "2"]],
)
def test_a_run_cut_off_continues_bit_for_bit(
    options: list[str], train: Callable[..., Path], interrupted: Callable[..., Path]
) -> None:
    """Cut off at step 7, it goes on from the checkpoint at 4, and no trace is left of the steps between."""
    whole, parts = train("whole", *options), interrupted("parts", 7, *options)
    assert_same_state(whole, parts)
    for name in ("train/loss", "val/loss", "lr", "grad_norm", "tokens_seen"):
        assert measured(whole, name) == measured(parts, name)


def test_a_run_cut_off_before_its_first_checkpoint_starts_again(
    undisturbed: Path, interrupted: Callable[..., Path]
) -> None:
    parts = interrupted("parts", 2)
    assert_same_state(undisturbed, parts)
    assert measured(undisturbed, "train/loss") == measured(parts, "train/loss")


def test_held_out_loss_is_not_lost_when_cut_off_during_the_last_validation(
    undisturbed: Path, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is written before the last validation."""
    real = Pretraining.validation_step

    def validation_step(module: Pretraining, batch: Any, batch_idx: int) -> None:
        if module.trainer.global_step == 12:
            raise RuntimeError("cut off")
        real(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "validation_step", validation_step)
        with pytest.raises(RuntimeError, match="cut off"):
            train("parts")
    parts = train("parts")
    assert measured(undisturbed, "val/loss") == measured(parts, "val/loss")
    assert (
        yaml.safe_load((parts / "manifest.json").read_text())["val_loss_nats"]
        == measured(parts, "val/loss")[12]
    )


@pytest.mark.slow
def test_more_steps_than_finished_continue_bit_for_bit(train: Callable[..., Path]) -> None:
    """With a constant rate, so that the schedule is the same for both lengths."""
    constant = ["--model.schedule", "wsd", "--model.decay_steps", "0"]
    whole = train("whole", *constant, "--trainer.max_steps", "20")
    train("parts", *constant, "--trainer.max_steps", "10")
    parts = train("parts", *constant, "--trainer.max_steps", "20")
    assert_same_state(whole, parts)
    assert measured(whole, "train/loss") == measured(parts, "train/loss")
    assert measured(whole, "val/loss") == measured(parts, "val/loss")


def test_a_finished_run_is_left_alone(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It once forgot its held-out loss when it was started again."""
    run = train("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train("run")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "run: finished already; a larger --trainer.max_steps continues it" in capsys.readouterr().err


def test_a_checkpoint_of_another_folder_starts_a_new_run(train: Callable[..., Path]) -> None:
    first = train("first", "--checkpoint.keep", "null")
    second = train("second", "--resume", str(first / "checkpoints" / "step-00000008.ckpt"))
    assert_same_state(first, second)
    assert list(measured(second, "train/loss")) == [9, 10, 11, 12]


def test_leftovers_of_a_torn_save_do_no_harm_and_go(train: Callable[..., Path]) -> None:
    run = train("run")
    for name in (".step-00000013.ckpt.tmp", ".last.ckpt.tmp"):
        (run / "checkpoints" / name).write_bytes(b"half a checkpoint")
    train("run", "--trainer.max_steps", "14")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step-00000012.ckpt",
        "step-00000014.ckpt",
    ]
    assert checkpoint(run)["global_step"] == 14


def test_last_always_names_a_whole_checkpoint_while_saving(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each rename, deletion and flush, what ``last.ckpt`` names can be loaded."""
    from sinktrain.training import saving

    looked: list[str] = []

    def watched(name: str) -> None:
        real = getattr(saving, name)

        def look(path: Path, *more: Any) -> Any:
            last = next(parent / LAST for parent in Path(path).parents if parent.name == "checkpoints")
            if Path(path).name == "checkpoints":
                last = Path(path) / LAST
            if last.is_symlink():
                torch.load(last, weights_only=True)
                looked.append(name)
            return real(path, *more)

        monkeypatch.setattr(saving, name, look)

    watched("_discard")
    train("run")
    assert looked


def test_half_a_row_in_the_table_is_forgotten(train: Callable[..., Path]) -> None:
    run = train("run")
    with (run / "metrics.csv").open("a") as file:
        file.write("13,2.0\n14,3.0,")
    train("run", "--trainer.max_steps", "14")
    assert list(measured(run, "train/loss")) == list(range(1, 15))


def test_the_course_of_a_run_holds_what_was_measured_beside_its_steps(train: Callable[..., Path]) -> None:
    run = train("run")
    held_out = next(
        curve for curve in curves(MetricsTable(run / "metrics.csv").rows()) if curve["metric"] == "val/loss"
    )
    assert dict(zip(held_out["step"], held_out["value"], strict=True)) == measured(run, "val/loss")
    manifest = json.loads((run / "manifest.json").read_text())
    assert held_out["tokens_seen"][-1] == manifest["tokens_seen"]
    assert held_out["train_seconds"][-1] == pytest.approx(manifest["hardware"]["train_seconds"], abs=1e-3)


def test_table_without_a_past_is_empty(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.forget_after(0)
    assert table.rows() == []
    assert not table.path.exists()


def test_changed_settings_are_told(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    train("run")
    capsys.readouterr()
    train("run", "--trainer.max_steps", "14", "--model.learning_rate", "0.02")
    told = capsys.readouterr().err
    assert "changed since the last start: model.learning_rate 0.01 -> 0.02\n" in told
    assert "changed since the last start: trainer.max_steps 12 -> 14\n" in told
    assert "from step-00000012.ckpt" in told


# -- configs --------------------------------------------------------------------------------------

SHIPPED = sorted(path.stem for path in config_folder().glob("*.yaml"))
SHARDED = ("fsdp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")
OVERLAYS = ("sink", "ddp", "wandb", "tensorboard", "wsd", "pythia-checkpoints", *SHARDED)
RECIPES = [name for name in SHIPPED if name not in OVERLAYS]
PARSED: dict[tuple[str, ...], Any] = {}
"""The settings that ``parsed`` has found, by the names of the configs."""


@pytest.fixture
def parsed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The settings that a command line gives, with nothing made of them."""
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(TrainingCLI, "before_instantiate_classes", lambda self: None)

    def parse(*names: str) -> Any:
        if names not in PARSED:
            configs = itertools.chain.from_iterable(("--config", name) for name in names)
            PARSED[names] = TrainingCLI([*configs, "--data.path", str(shards)]).config
        return PARSED[names].clone()

    return parse


def test_shipped_configs_are_those_of_the_interface() -> None:
    sizes = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b")
    assert {"quickstart", "paper-160m", *OVERLAYS, *(f"pythia-{size}" for size in sizes)} <= set(SHIPPED)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_config_parses_alone_and_with_every_overlay(name: str, parsed: Callable[..., Any]) -> None:
    alone = parsed(name)
    assert alone.model.sink.kind == "none"
    assert alone.trainer.max_steps > 0
    together = parsed(name, *OVERLAYS[:3])
    assert together.model.sink.kind == "token"
    assert together.trainer.strategy.class_path.endswith("DDPStrategy")
    assert together.trainer.logger.class_path.endswith("WandbLogger")
    assert together.model.network == alone.model.network


@pytest.mark.parametrize(
    "name", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES[1:])]
)
def test_the_tensorboard_overlay_changes_the_logger_of_any_recipe(
    name: str, parsed: Callable[..., Any]
) -> None:
    assert parsed(name, "tensorboard").trainer.logger.class_path.endswith("TensorBoardLogger")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("pythia-")])
def test_pythia_recipe_is_pythias(name: str, parsed: Callable[..., Any]) -> None:
    config = parsed(name)
    rates = {"14m": 1e-3, "31m": 1e-3, "70m": 1e-3, "160m": 6e-4, "410m": 3e-4, "1b": 2.5e-4, "1.4b": 2e-4}
    assert config.model.learning_rate == rates[name.removeprefix("pythia-")]
    assert config.trainer.max_steps == 143_000
    assert config.data.global_batch * config.data.seq_len == 2_097_152
    assert config.data.global_batch % config.data.micro_batch == 0
    assert (config.model.schedule, config.model.min_lr_ratio, config.model.warmup_steps) == (
        "cosine",
        0.1,
        None,
    )
    assert (config.model.weight_decay, tuple(config.model.betas), config.model.eps) == (
        0.1,
        (0.9, 0.95),
        1e-8,
    )
    assert config.model.clip_norm == 1.0
    preset = NetworkConfig(**{**vars(config.model.network), "vocab_size": 50304})
    assert preset == PYTHIA[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_config_begins_with_its_command(name: str) -> None:
    head = itertools.takewhile(lambda line: line.startswith("#"), find_config(name).read_text().splitlines())
    commands = [
        line for line in head if re.match(r"#\s+(sinktrain fit --config \S+|scripts/quickstart)", line)
    ]
    assert any(name in line for line in commands), f"configs/{name}.yaml does not say how to use it"


def test_run_folder_is_named_after_the_configs() -> None:
    assert (
        default_run(["--config", "pythia-160m", "--config=sink", "--seed_everything", "3"])
        == "runs/pythia-160m-sink"
    )
    assert default_run(["--config=mine/tiny.yaml", "--config", "sink"]) == "runs/tiny-sink"
    assert default_run(["--config", "pythia-1.4b"]) == "runs/pythia-1.4b"  # not "pythia-1"
    assert default_run([]) == "runs/run"


def test_config_is_found_by_path_before_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config("sink") == config_folder() / "sink.yaml"
    (tmp_path / "sink").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_config("sink") == Path("sink")
    with pytest.raises(ConfigError, match=r"no such file, and no shipped config of that name$"):
        find_config("xyz")


def test_the_config_of_a_run_starts_the_same_run_again(
    train: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    first = train("first", "--config", "sink", "--model.learning_rate", "0.02")
    assert main(["fit", "--config", str(first / "config.yaml"), "--run", str(tmp_path / "second")]) == 0
    assert_same_state(first, tmp_path / "second")


def test_print_config_prints_every_setting(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "fit",
                "--config",
                "pythia-14m",
                "--config",
                "sink",
                "--data.path",
                str(shards),
                "--print_config",
            ]
        )
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["sink"]["kind"] == "token"
    assert printed["model"]["network"]["hidden_size"] == 128
    assert printed["data"]["micro_batch"] == 32


# -- the trainer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_elastic", [False, True])
def test_slurm_does_not_requeue_inside_a_signal_handler(
    is_elastic: bool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by torchrun within SLURM, the run belongs to torchrun, as Lightning has it."""
    cli = TrainingCLI(tiny_run(shards, tmp_path / "run"))
    assert "SLURM" not in environment_of(cli)
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    if is_elastic:
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
            monkeypatch.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert environment_of(cli) == (
        "TorchElasticEnvironment" if is_elastic else "SLURMEnvironment, no requeue"
    )


def environment_of(cli: TrainingCLI) -> str:
    environment = cli.make_trainer(is_training=True)._accelerator_connector.cluster_environment
    requeue = ", no requeue" if getattr(environment, "auto_requeue", None) is False else ""
    return type(environment).__name__ + requeue


def test_slurm_asked_for_in_a_way_lightning_cannot_take_is_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main(["fit", *tiny_run(shards, tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "sinktrain fit: trainer: You set --ntasks=2 in your SLURM bash script" in told
    assert told.count("\n") == 1


# -- loggers --------------------------------------------------------------------------------------


def test_tensorboard_logs_lie_in_the_run_folder_and_go_on(train: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("run", "--config", "tensorboard")
    run = train("run", "--config", "tensorboard", "--trainer.max_steps", "14")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 15))
    assert events.Scalars("val/loss")[-1].value == pytest.approx(measured(run, "val/loss")[14])


def test_a_missing_logger_package_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for overlay, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        assert main(["fit", *tiny_run(shards, tmp_path / "run", "--config", overlay)]) == 2
        assert f"trainer.logger needs the package {package}; pip install" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.slow  # wandb's own service takes some seconds to start
def test_wandb_offline_logs_lie_in_the_run_folder_and_keep_their_id(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train("run", "--config", "wandb")
    train("run", "--config", "wandb", "--trainer.max_steps", "14")
    files = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = yaml.safe_load((run / "manifest.json").read_text())["run_id"]
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
