"""``sinktrain fit`` and ``sinktrain validate``: the steps from a command line to a run, or to its loss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only

from sinktrain.data.tokenizer import TOKENIZER_FILE
from sinktrain.errors import ConfigError
from sinktrain.files import write_text
from sinktrain.model.checkpoints import checkpoint_facts, empty_model
from sinktrain.training.module import arm_name
from sinktrain.training.run import differences
from sinktrain.training.settings import MoreCallbacks, TrainingCLI
from sinktrain.training.stopping import Stopped


def fit(args: list[str], measures: MoreCallbacks | None = None) -> None:
    """Train, or continue, the run that the command line describes.

    Args:
        measures: gives further callbacks, such as ``sinktrain.experiments.emergence.streaming_gaps``.

    Raises:
        SinktrainError: a setting, config, run folder, checkpoint or corpus that cannot be used.
        Stopped: by a signal, after saving.
    """
    cli = TrainingCLI(args)
    run = cli.run
    identity = cli.identity()
    checkpoint = _checkpoint_to_resume(cli, identity)
    trainer = cli.make_trainer(is_training=True, measures=measures)
    _check_together(cli, trainer)
    if checkpoint == run.last and run.is_finished(trainer.max_steps):
        _say(f"{run.path}: finished already; a larger --trainer.max_steps continues it")
        return
    if _is_rank_zero():
        _announce(cli, checkpoint)
        run.write_manifest(identity, run_id=cli.run_id, arm=arm_name(cli.model.sink), is_finished=False)
        run.prepare(cli.datamodule.path / TOKENIZER_FILE)
        write_text(run.path / "config.yaml", cli.dump())
    try:
        _train(cli, trainer, checkpoint)
    except Stopped:
        if _is_rank_zero():
            raise
        return  # rank 0 speaks for all: Lightning kills it if it finds another one failed
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


def _checkpoint_to_resume(cli: TrainingCLI, identity: dict[str, Any]) -> Path | None:
    run, resume = cli.run, cli.config.resume
    if not _is_rank_zero():  # only rank 0 checks the folder, which it is writing to already
        if resume == "auto":
            return run.last if run.last.exists() else None
        return None if resume == "none" else Path(resume)
    checkpoint = run.checkpoint_to_resume(resume, identity)
    if checkpoint is not None and resume != "auto":
        same = {key: identity[key] for key in ("model", "data_fingerprint", "seed_everything")}
        remedy = "to start anew from its weights, use --model.init_from instead"
        _check_made_with(same, f"--resume {checkpoint}", checkpoint, remedy)
    return checkpoint


def _check_made_with(identity: dict[str, Any], typed: str, checkpoint: Path, remedy: str) -> None:
    """Refuse a checkpoint that the user named, if it differs from the settings in these keys of theirs."""
    facts = checkpoint_facts(checkpoint)
    made_with = facts | {"seed_everything": facts.get("seed")}
    found = differences({key: made_with.get(key) for key in identity}, identity)
    if found:
        raise ConfigError(f"{typed} was made with {found}; {remedy}")


def _check_together(cli: TrainingCLI, trainer: pl.Trainer) -> None:
    """Find what does not fit together before anything is written: steps, batches, devices, text."""
    cli.model.trainer = cli.datamodule.trainer = trainer
    cli.model.schedule  # noqa: B018
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


def _announce(cli: TrainingCLI, checkpoint: Path | None) -> None:
    config = cli.model.model_config(cli.datamodule)
    num_parameters = sum(parameter.numel() for parameter in empty_model(config).parameters())
    start = "from the start" if checkpoint is None else f"from {checkpoint.resolve().name}"
    _say(f"{cli.run.path}: {arm_name(config.sink)}, {num_parameters / 1e6:.1f}m parameters, {start}")
    before = cli.run.path / "config.yaml"
    if checkpoint is not None and before.exists():
        for line in _changed_lines(before.read_text(encoding="utf-8"), cli.dump()):
            _say(f"  changed since the last start: {line}")


def _changed_lines(before: str, after: str) -> list[str]:
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in changed]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _finish(cli: TrainingCLI, trainer: pl.Trainer, identity: dict[str, Any]) -> None:
    val_loss = trainer.callback_metrics.get("val/loss")
    facts = {
        "run_id": cli.run_id,
        "arm": arm_name(cli.model.sink),
        "is_finished": trainer.global_step >= trainer.max_steps,
        "global_step": trainer.global_step,
        "tokens_seen": cli.datamodule.samples_consumed * cli.datamodule.seq_len,
        "val_loss_nats": None if val_loss is None else float(val_loss),
    }
    cli.run.write_manifest(identity, **facts)
    ended = "finished" if facts["is_finished"] else "ended"
    held_out = "" if val_loss is None else f", held-out loss {float(val_loss):.4f} nats"
    _say(f"{cli.run.path}: {ended} at step {trainer.global_step}{held_out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
