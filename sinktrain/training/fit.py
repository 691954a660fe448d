"""``sinktrain fit`` and ``sinktrain validate``: the steps from a command line to a run, or to its loss."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only

from sinktrain.data.tokenizer import TOKENIZER_FILE
from sinktrain.errors import ConfigError, TrainingError
from sinktrain.files import write_text
from sinktrain.model.checkpoints import checkpoint_facts, empty_model
from sinktrain.training.checkpoint_file import check_whole
from sinktrain.training.companions import LAUNCHED_BY
from sinktrain.training.continuing import Continuation, leave_behind, set_aside
from sinktrain.training.dry_run import plan
from sinktrain.training.launchers import find_once, told_once_a_host
from sinktrain.training.loggers import wandb_url
from sinktrain.training.memory import checkpoint_bytes, num_parameters
from sinktrain.training.metrics_table import MetricsTable, train_seconds
from sinktrain.training.run import ONCE_IMPLIED, differences
from sinktrain.training.saving import what_continues
from sinktrain.training.settings import MoreCallbacks, TrainingCLI
from sinktrain.training.starting import find_start, is_finished, start_text
from sinktrain.training.stopping import Stopped


def fit(args: list[str], measures: MoreCallbacks | None = None) -> None:
    """Train, or continue, the run that the command line describes.

    Args:
        measures: gives further callbacks, such as ``sinktrain.experiments.emergence.streaming_gaps``.

    Raises:
        SinktrainError: a setting, config, run folder, checkpoint or corpus that cannot be used.
        Stopped: by a signal, after saving.
    """
    if _is_rank_zero():
        os.environ[LAUNCHED_BY] = str(os.getpid())
    with told_once_a_host():
        cli = TrainingCLI(args)
    if not cli.num_trial_steps:
        _fit(cli, measures)
        return
    with TemporaryDirectory(prefix="sinktrain-") as scratch:
        cli.config.run, cli.config.resume = str(Path(scratch, cli.run.path.name)), "none"
        _fit(cli, measures)
    if _is_rank_zero():
        _say(f"{cli.title}: nothing of it is kept; leave --trainer.fast_dev_run out to train")


def _fit(cli: TrainingCLI, measures: MoreCallbacks | None) -> None:
    """Check everything; then train, or for a dry run say what that would be."""
    with told_once_a_host():
        identity = cli.identity()
        if _is_rank_zero():  # only rank 0 checks the folder, which it may be writing to already
            cli.run.check_is_ours(cli.config.resume, identity)
            if not cli.run.has_resumed(cli.config.resume):
                _check_named(cli.config.resume, identity)
        trainer = cli.make_trainer(is_training=True, measures=measures)
        _check_together(cli, trainer)
    if cli.config.dry_run:
        if _is_rank_zero():
            print(plan(cli, trainer, find_start(cli).checkpoint))
        return
    with cli.run.locked() if _is_rank_zero() else nullcontext():
        try:
            _continue(cli, trainer, identity)
        except (Stopped, TrainingError):
            if _is_rank_zero():
                raise  # the others stop alike, and rank 0 speaks for all
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = f"free some space: {what_continues(cli.run.checkpoints)}"
            raise TrainingError(f"--run {cli.run.path}: {error.strerror}; {remedy}") from error


def _continue(cli: TrainingCLI, trainer: pl.Trainer, identity: dict[str, Any]) -> None:
    """Train from where the run is, to its end."""
    run = cli.run
    with told_once_a_host():
        found = find_once(trainer, lambda: find_start(cli))
    if is_finished(cli, found.checkpoint, trainer.max_steps):
        if _is_rank_zero():
            _say(f"{cli.title}: finished already; a larger --trainer.max_steps continues it")
        return
    if _is_rank_zero():
        _announce(cli, found)
        _warn_of_little_space(cli, min(cli.num_trial_steps or trainer.max_steps, trainer.max_steps))
        run.prepare(cli.datamodule.path / TOKENIZER_FILE)
        if found.checkpoint and cli.config.resume != "auto" and not run.has_resumed(cli.config.resume):
            leave_behind(run.checkpoints, found.checkpoint)
        facts = {"run_id": cli.run_id, "arm": cli.model.arm, "is_finished": False}
        run.write_manifest(identity, **facts, resumed_from=run.resumed_from(cli.config.resume))
        write_text(run.path / "config.yaml", cli.dump())
        if cli.config.resume == "auto" and found.checkpoint not in (None, run.last):
            set_aside(found)
    _train(cli, trainer, found.checkpoint)
    if trainer.is_global_zero:
        _finish(cli, trainer, identity)


def validate(args: list[str]) -> dict[str, float]:
    """Held-out loss of a checkpoint: ``{"val/loss": nats}``.

    Raises:
        SinktrainError: a setting, config, checkpoint or corpus that cannot be used.
    """
    cli = TrainingCLI(args)
    checkpoint = cli.config.ckpt_path
    if checkpoint is None or not Path(checkpoint).is_file():
        problem = "is missing" if checkpoint is None else f"{checkpoint}: there is no such checkpoint"
        raise ConfigError(f"--ckpt_path {problem}; pass one of a run's checkpoints/")
    identity = {key: cli.identity()[key] for key in ("model", "data_fingerprint")}
    remedy = "pass the config.yaml of its run as --config"
    _check_made_with(identity, f"--ckpt_path {checkpoint}", Path(checkpoint), remedy)
    trainer = cli.make_trainer(is_training=False)
    trainer.validate(
        cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False
    )
    return {"val/loss": float(trainer.callback_metrics["val/loss"])}


def _is_rank_zero() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _check_named(resume: str, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint that the user named: missing, damaged, or made with other settings."""
    if resume in ("auto", "none"):
        return
    checkpoint = Path(resume)
    if checkpoint.is_dir():
        raise ConfigError(
            f"--resume {resume} is a folder; name one of its checkpoints, such as {checkpoint}/checkpoints/"
            f"last.ckpt, or continue the run itself with --run {resume}"
        )
    if not checkpoint.is_file():
        raise ConfigError(
            f"--resume {resume}: there is no such checkpoint; use auto, none or a checkpoint's path"
        )
    decisive = ("model", "optimizer", "data_fingerprint", "seed_everything")
    remedy = "to start anew from its weights, use --model.init_from instead"
    _check_made_with({key: identity[key] for key in decisive}, f"--resume {checkpoint}", checkpoint, remedy)
    check_whole(checkpoint)


def _check_made_with(identity: dict[str, Any], typed: str, checkpoint: Path, remedy: str) -> None:
    """Refuse a checkpoint that the user named, if it differs from the settings in these keys of theirs."""
    facts = checkpoint_facts(checkpoint)
    made_with = ONCE_IMPLIED | facts | {"seed_everything": facts.get("seed")}
    found = differences({key: made_with.get(key) for key in identity}, identity)
    if found:
        raise ConfigError(f"{typed} was made with {found}; {remedy}")


def _check_together(cli: TrainingCLI, trainer: pl.Trainer) -> None:
    """Find what does not fit together before anything is written: steps, batches, devices, text."""
    cli.model.trainer = cli.datamodule.trainer = trainer
    cli.model.schedule  # noqa: B018
    cli.model.check_strategy()
    cli.datamodule.train_dataloader()
    cli.datamodule.val_dataloader()


def _train(cli: TrainingCLI, trainer: pl.Trainer, checkpoint: Path | None) -> None:
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if "val/loss" not in trainer.callback_metrics:  # cut off after the last checkpoint was written
            trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of it
            raise KeyboardInterrupt from error
        raise


def _announce(cli: TrainingCLI, found: Continuation) -> None:
    config, checkpoint = cli.model.model_config(cli.datamodule), found.checkpoint
    for problem in found.passed_over.values():
        _say(f"{cli.title}: {problem}; continuing from the one before")
    size = num_parameters(empty_model(config)) / 1e6
    _say(f"{cli.title}: {cli.model.arm}, {size:.1f}m parameters, {start_text(cli, checkpoint)}")
    rows = MetricsTable(cli.run.path / "metrics.csv").rows()
    if checkpoint is None and rows and int(rows[-1]["step"]) > 0:
        _say(f"  its metrics.csv reached step {rows[-1]['step']} and begins anew: no checkpoint is left")
    before = cli.run.path / "config.yaml"
    if checkpoint is not None and before.exists():
        for line in _changed_lines(before.read_text(encoding="utf-8"), cli.dump()):
            _say(f"  changed since the last start: {line}")


def _warn_of_little_space(cli: TrainingCLI, num_steps: int) -> None:
    """Say now what would otherwise end the run at one of its checkpoints."""
    folder = cli.run.checkpoints
    there = sum(path.stat().st_size for path in folder.glob("step-*.ckpt"))
    model = empty_model(cli.model.model_config(cli.datamodule))
    each = checkpoint_bytes(model, cli.model.optimizer_kind == "muon")
    needed = each * cli.config_init.checkpoint.most_at_once(num_steps)
    free = shutil.disk_usage(cli.run.path).free
    if free + there < needed:
        _say(
            f"{cli.title}: checkpoints will take some {(needed - there) / 1e9:.1f} GB "
            f"and {free / 1e9:.1f} GB are free; free some space, or use a smaller --checkpoint.keep"
        )


def _changed_lines(before: str, after: str) -> list[str]:
    """One line for each setting; another class is one line too, whatever its own settings."""
    return list(_changes("", yaml.safe_load(before), yaml.safe_load(after)))


def _changes(name: str, old: Any, new: Any) -> Iterator[str]:
    is_section = isinstance(old, dict) and isinstance(new, dict)
    if is_section and old.get("class_path") == new.get("class_path"):
        for key in {**old, **new}:
            yield from _changes(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{name} {_brief(old)} -> {_brief(new)}"


def _brief(value: Any) -> Any:
    """A class by its name, anything else as it is."""
    if isinstance(value, list):
        return [_brief(entry) for entry in value]
    if isinstance(value, dict) and "class_path" in value:
        return value["class_path"].rpartition(".")[2]
    return value


def _finish(cli: TrainingCLI, trainer: pl.Trainer, identity: dict[str, Any]) -> None:
    val_loss = trainer.callback_metrics.get("val/loss")
    facts = {
        "run_id": cli.run_id,
        "arm": cli.model.arm,
        "is_finished": trainer.global_step >= trainer.max_steps,
        "global_step": trainer.global_step,
        "tokens_seen": cli.datamodule.samples_consumed * cli.datamodule.seq_len,
        "val_loss_nats": None if val_loss is None else float(val_loss),
        "resumed_from": cli.run.resumed_from(cli.config.resume),
        "hardware": _hardware(cli, trainer),
        "wandb_url": wandb_url(trainer.loggers),
    }
    cli.run.write_manifest(identity, **facts)
    ended = "finished" if facts["is_finished"] else "ended"
    held_out = "" if val_loss is None else f", held-out loss {float(val_loss):.4f} nats"
    _say(f"{cli.title}: {ended} at step {trainer.global_step}{held_out}")


def _hardware(cli: TrainingCLI, trainer: pl.Trainer) -> dict[str, Any]:
    """What the run was trained on at last, and how long all its steps took, validation and saving aside."""
    device = trainer.strategy.root_device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_devices": trainer.world_size,
        "train_seconds": train_seconds(MetricsTable(cli.run.path / "metrics.csv").rows()),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
