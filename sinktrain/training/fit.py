"""``sinktrain fit`` and ``sinktrain validate``: configs and options, by LightningCLI, to a run."""

from __future__ import annotations

import logging
import re
import sys
import uuid
import warnings
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_only

from sinktrain.data.datamodule import WindowData
from sinktrain.data.tokenizer import TOKENIZER_FILE
from sinktrain.errors import ConfigError, did_you_mean
from sinktrain.files import write_text
from sinktrain.model.checkpoints import CHECKPOINT_KEY, describe
from sinktrain.training.callbacks import (
    Checkpoints,
    CheckpointSettings,
    Metrics,
    ProgressBar,
    StopOnSignal,
    Stopped,
)
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining, arm_name
from sinktrain.training.run import RunFolder, differences

TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": -1,  # one endless epoch: the loader never ends, max_steps does
    "max_steps": -1,
    "val_check_interval": 1000,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "logger": False,  # metrics.csv is always written; overlays add others
    "enable_checkpointing": False,  # ours are atomic
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}

UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "precision": (lambda value: value in ("16-mixed", "16-true", "16", 16), "bf16-mixed or 32-true"),
    "accumulate_grad_batches": (lambda value: value != 1, "data.micro_batch, which does the same"),
    "gradient_clip_val": (lambda value: value is not None, "model.clip_norm"),
}
"""Settings of Lightning's that would not do here: which values, and what does."""


def fit(args: list[str]) -> None:
    """Train, or continue, the run that the command line describes.

    Raises:
        SinktrainError: a setting, config, run folder, checkpoint or corpus that cannot be used.
        Stopped: by a signal, after saving.
    """
    _quiet_lightning()
    cli = _Cli(args)
    run = cli.run
    identity = cli.identity()
    checkpoint = _checkpoint_to_resume(cli, run, identity)
    trainer = cli.make_trainer(is_training=True)
    _check_together(cli, trainer)
    if checkpoint == run.last and run.is_finished(trainer.max_steps):
        _say(f"{run.path}: finished already; a larger --trainer.max_steps continues it")
        return
    if _is_rank_zero():
        _announce(run, checkpoint, cli)
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
        _finish(run, identity, cli, trainer)


def validate(args: list[str]) -> dict[str, float]:
    """Held-out loss of a checkpoint: ``{"val/loss": nats}``.

    Raises:
        ConfigError: a setting, config or checkpoint that cannot be used.
    """
    _quiet_lightning()
    cli = _Cli(args)
    checkpoint = cli.config.ckpt_path
    if checkpoint is None:
        raise ConfigError("--ckpt_path is missing; pass one of a run's checkpoints/")
    if not Path(checkpoint).is_file():
        raise ConfigError(
            f"--ckpt_path {checkpoint}: there is no such checkpoint; pass one of a run's checkpoints/"
        )
    different = _differences_of_checkpoint(Path(checkpoint), cli.identity(), ("model", "data_fingerprint"))
    if different:
        raise ConfigError(
            f"--ckpt_path {checkpoint} was made with {different}; pass the config.yaml of its run as --config"
        )
    trainer = cli.make_trainer(is_training=False)
    trainer.validate(
        cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False
    )
    return {"val/loss": float(trainer.callback_metrics["val/loss"])}


# -- configs by name ------------------------------------------------------------------------------


def config_folder() -> Path:
    """Where the shipped configs are: in an installed wheel, or beside the package in its repository."""
    package = Path(str(files("sinktrain")))
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A config file by its path, or by the name of a shipped one.

    Raises:
        ConfigError: neither is there.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in config_folder().glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped)
    raise ConfigError(f"--config {name}: no such file, and no shipped config of that name{hint}")


def default_run(args: list[str]) -> str:
    """``runs/`` and the names of the configs, so that arms never share a folder."""
    names = [Path(value.removesuffix(".yaml")).name for value in _config_values(args)]
    return str(Path("runs") / "-".join(names)) if names else "runs/run"


def _config_values(args: list[str]) -> list[str]:
    values = []
    for flag, value in pairwise([*args, ""]):
        if flag.startswith("--config="):
            values.append(flag.partition("=")[2])
        elif flag in ("--config", "-c"):
            values.append(value)
    return values


def _with_config_paths(args: list[str]) -> list[str]:
    resolved = list(args)
    for index, arg in enumerate(args):
        if arg.startswith("--config="):
            resolved[index] = f"--config={find_config(arg.partition('=')[2])}"
        elif index and args[index - 1] in ("--config", "-c"):
            resolved[index] = str(find_config(arg))
    return resolved


# -- the command line -----------------------------------------------------------------------------


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_plain_message(message, self)) from ex


class _Cli(LightningCLI):
    """LightningCLI without subcommands (each costs seconds to build) and without what it decides for us."""

    config: Any
    model: Pretraining
    datamodule: WindowData

    def __init__(self, args: list[str]) -> None:
        self.default_run = default_run(args)
        super().__init__(
            Pretraining,
            WindowData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1234,
            parser_class=_Parser,
            parser_kwargs={"allow_abbrev": False},
            args=_with_config_paths(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        optional = str | None
        parser.add_argument("--run", type=optional, default=None, help="folder; after the configs when null")
        parser.add_argument("--resume", default="auto", help="auto, none or a checkpoint's path")
        parser.add_argument("--ckpt_path", type=optional, default=None, help="what validate scores")
        parser.add_class_arguments(CheckpointSettings, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        if not 0 <= self.config.seed_everything < 2**32:
            raise ConfigError(f"seed_everything is {self.config.seed_everything}; use 0 to {2**32 - 1}")

    def before_instantiate_classes(self) -> None:
        loggers = self.config.trainer.logger
        self.run_id = self.run.read_id() or uuid.uuid4().hex[:12]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "class_path"):
                _place_logger(logger, self.run, self.run_id)

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.config.run or self.default_run))

    def instantiate_trainer(self, **_: Any) -> Any:
        """Made by ``make_trainer`` once the run folder is known."""
        return None

    def make_trainer(self, is_training: bool) -> pl.Trainer:
        """The Trainer of the run, or one that only validates and leaves the run folder alone."""
        settings = dict(self.config_init.trainer)
        for name, (bad, remedy) in UNSUPPORTED.items():
            if bad(settings.get(name)):
                raise ConfigError(f"trainer.{name} {settings[name]} is not supported; use {remedy}")
        settings["callbacks"] = list(settings.get("callbacks") or [])
        if not is_training:
            return _trainer(settings | {"enable_progress_bar": False, "logger": False})
        metrics = Metrics(MetricsTable(self.run.path / "metrics.csv"))
        checkpoints = Checkpoints(self.run.checkpoints, self.config_init.checkpoint)
        ours = [metrics, checkpoints, StopOnSignal(checkpoints)]
        if settings.get("enable_progress_bar") is not False:
            ours.append(ProgressBar(metrics))
        settings["callbacks"] += ours
        return _trainer(settings | {"default_root_dir": self.run.path})

    def identity(self) -> dict[str, Any]:
        """What a run folder must agree on to be continued."""
        return {
            "model": self.model.model_config(self.datamodule).to_dict(),
            "init_from": self.model.init_from,
            "data_fingerprint": self.datamodule.manifest.fingerprint,
            "score_sink": self.datamodule.score_sink,
            "seed_everything": self.config.seed_everything,
        }

    def dump(self) -> str:
        text: str = self.parser.dump(self.config, skip_link_targets=True, skip_none=False, format="yaml")
        return text


def _trainer(settings: dict[str, Any]) -> pl.Trainer:
    try:
        return pl.Trainer(**settings)
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def _place_logger(logger: Any, run: RunFolder, run_id: str) -> None:
    """Keep a logger's files in the run folder, and a continued run in the same W&B run."""
    name = logger.class_path.rpartition(".")[2]
    if name == "WandbLogger":
        _need("wandb", "pip install 'sinktrain[wandb]'")
        placed = {"save_dir": str(run.path), "name": run.path.name, "id": run_id}
    elif name == "TensorBoardLogger":
        _need("tensorboard", "pip install tensorboard")
        placed = {"save_dir": str(run.path), "name": "tensorboard", "version": ""}
    else:
        return
    for key, value in placed.items():
        logger.init_args[key] = value


def _need(package: str, remedy: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"trainer.logger needs the package {package}; {remedy}, or leave that overlay out")


_UNKNOWN_SETTING = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<inner>[^']+)'"
    r"|[Uu]nrecognized arguments: (?P<argument>\S+)"
)

_PLAIN_WORDS = [
    ("Parser key ", "setting "),
    (r"Does not validate .*? Subtypes: \[(.*)\] Errors: .* value: (.*)", r"Expected a \1. Got value: \2"),
    (r"<class 'NoneType'>", "null"),
    (r"<class '(\w+)'>", r"\1"),
    (r"typing\.Literal\[(.*?)\]", r"\1"),
    (r"Expected a (.*)\. Got value: (.*)", r"expected \1, found \2"),
]
"""What jsonargparse says of a value, and what we say."""


def _plain_message(message: str, parser: LightningArgumentParser) -> str:
    """jsonargparse's message in one line that names the setting, and the one that was probably meant."""
    text = " ".join(message.split())
    unknown = _UNKNOWN_SETTING.search(text)
    if unknown:
        found = unknown.groupdict()
        name = found["option"] or found["argument"] or f"{found['group']}.{found['inner']}"
        name = name.lstrip("-").partition("=")[0]
        known = [action.dest for action in parser._actions]
        return f'unknown setting "{name}"{did_you_mean(name, known)}'
    missing = re.search(r"the following arguments are required: (.+)", text)
    if missing and "data.path" in missing[1]:
        return "data.path is missing; pass --data.path SHARDS, made by sinktrain prepare"
    for pattern, plain in _PLAIN_WORDS:
        text = re.sub(pattern, plain, text)
    return text


# -- the steps of a run ---------------------------------------------------------------------------


def _is_rank_zero() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _checkpoint_to_resume(cli: _Cli, run: RunFolder, identity: dict[str, Any]) -> Path | None:
    resume = cli.config.resume
    if _is_rank_zero():
        checkpoint = run.checkpoint_to_resume(resume, identity)
        if checkpoint is not None and resume != "auto":
            keys = ("model", "data_fingerprint", "seed_everything")
            different = _differences_of_checkpoint(checkpoint, identity, keys)
            if different:
                raise ConfigError(
                    f"--resume {checkpoint} was made with {different}; "
                    "to start anew from its weights, use --model.init_from instead"
                )
        return checkpoint
    # Only rank 0 checks the folder, which it is writing to already.
    if resume == "auto":
        return run.last if run.last.exists() else None
    return None if resume == "none" else Path(resume)


def _differences_of_checkpoint(path: Path, identity: dict[str, Any], keys: tuple[str, ...]) -> str:
    """How a checkpoint that the user named differs from the settings, in those keys; empty if it does not."""
    describe(path)  # refuses what is no checkpoint of ours
    facts = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[CHECKPOINT_KEY]
    made_with = {**facts, "seed_everything": facts["seed"]}
    return differences({key: made_with[key] for key in keys}, {key: identity[key] for key in keys})


def _check_together(cli: _Cli, trainer: pl.Trainer) -> None:
    """Find what does not fit together before anything is written: steps, batches, devices, text."""
    cli.model.trainer = cli.datamodule.trainer = trainer
    cli.model.schedule  # noqa: B018
    cli.datamodule.train_dataloader()
    cli.datamodule.val_dataloader()


def _train(cli: _Cli, trainer: pl.Trainer, checkpoint: Path | None) -> None:
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if "val/loss" not in trainer.callback_metrics:  # cut off after the last checkpoint was written
            trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of it
            raise KeyboardInterrupt from error
        raise


def _announce(run: RunFolder, checkpoint: Path | None, cli: _Cli) -> None:
    config = cli.model.model_config(cli.datamodule)
    num_parameters = "?"
    with torch.device("meta"):
        from sinktrain.model.neox import GPTNeoX

        num_parameters = f"{sum(p.numel() for p in GPTNeoX(config).parameters()) / 1e6:.1f}m"
    start = "from the start" if checkpoint is None else f"from {checkpoint.resolve().name}"
    _say(f"{run.path}: {arm_name(config.sink)}, {num_parameters} parameters, {start}")
    before = run.path / "config.yaml"
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


def _finish(run: RunFolder, identity: dict[str, Any], cli: _Cli, trainer: pl.Trainer) -> None:
    val_loss = trainer.callback_metrics.get("val/loss")
    facts = {
        "run_id": cli.run_id,
        "arm": arm_name(cli.model.sink),
        "is_finished": trainer.global_step >= trainer.max_steps,
        "global_step": trainer.global_step,
        "tokens_seen": cli.datamodule.samples_consumed * cli.datamodule.seq_len,
        "val_loss_nats": None if val_loss is None else float(val_loss),
    }
    run.write_manifest(identity, **facts)
    ended = "finished" if facts["is_finished"] else "ended"
    held_out = "" if val_loss is None else f", held-out loss {float(val_loss):.4f} nats"
    _say(f"{run.path}: {ended} at step {trainer.global_step}{held_out}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet_lightning() -> None:
    """Silence what says nothing about the run: hardware that is absent, tips, known deprecations."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec.*",
        ".*litlogger.*",
        ".*sync_dist=True.*",  # val/loss is summed over the ranks already
        ".*broadcast_buffers.*",
    ):
        warnings.filterwarnings("ignore", message=text)
