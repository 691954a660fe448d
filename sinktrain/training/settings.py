"""The settings of a run: parsed and checked by LightningCLI, with plain messages; the Trainer they make."""

from __future__ import annotations

import logging
import re
import sys
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import ActionYesNo
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sinktrain.data.datamodule import WindowData
from sinktrain.errors import ConfigError, did_you_mean
from sinktrain.training.checks import check_device, check_precision
from sinktrain.training.companions import Companions
from sinktrain.training.configs import default_run, with_config_paths
from sinktrain.training.launchers import leave_group_at_exit, torchrun_devices
from sinktrain.training.loggers import LoggedRun
from sinktrain.training.metrics import Metrics, ProgressBar
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.run import RunFolder
from sinktrain.training.saving import Checkpoints, CheckpointSettings
from sinktrain.training.stopping import StopOnSignal, StopWhenSkipping
from sinktrain.training.trial import StopAfter, trial_settings

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
    "precision": (
        lambda value: value not in (None, "bf16-mixed", "bf16", "32-true", "32", 32),  # weights are float32
        "bf16-mixed or 32-true",
    ),
    "accumulate_grad_batches": (lambda value: value != 1, "data.micro_batch, which does the same"),
    "gradient_clip_val": (lambda value: value is not None, "model.clip_norm"),
    "strategy": (
        lambda value: str(value).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")),
        "ddp, whose processes start anew",
    ),
    "limit_train_batches": (lambda value: value is not None, "trainer.max_steps"),  # would repeat them
    "overfit_batches": (lambda value: value != 0, "a smaller corpus"),
    "log_every_n_steps": (lambda value: value is not None and value < 1, "1 or more"),
    "val_check_interval": (
        lambda value: not isinstance(value, int) or value < 1,
        "a number of steps, or trainer.limit_val_batches 0 for no validation",
    ),
}
"""Settings of Lightning's that would not do here: which values, and what does."""


@dataclass(frozen=True)
class StreamingSettings:
    """How streaming is measured while a model trains, to see when a sink emerges.

    Args:
        every_n_steps: optimizer steps between measurements, besides one before the first step and one
            after the last; never when null or 0.
        max_tokens: held-out tokens scored each time; 8192 when null, or four times the largest layout
            where that is more.
        layouts: ``sinks+window``, separated by commas; when null 0+N, 1+(N-1), 4+(N-4) and the model's
            own sinks, N half of ``data.seq_len``.
    """

    every_n_steps: int | None = 1000
    max_tokens: int | None = None
    layouts: str | None = None

    def __post_init__(self) -> None:
        if (self.every_n_steps or 0) < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ConfigError(
                f"streaming.every_n_steps {self.every_n_steps} must be 0 (never) or more, "
                f"and streaming.max_tokens {self.max_tokens} 1 or more"
            )


class TrainingCLI(LightningCLI):
    """LightningCLI without subcommands (each costs seconds to build) and without what it decides for us.

    Args:
        args: the command line, configs by path or name.

    Raises:
        SinktrainError: a setting or config that cannot be used.
    """

    config: Any
    model: Pretraining
    datamodule: WindowData
    run_id: str
    uploads_model: bool

    def __init__(self, args: list[str]) -> None:
        _quiet_lightning()
        self.default_run = default_run(args)
        super().__init__(
            Pretraining,
            WindowData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1234,
            parser_class=_Parser,
            parser_kwargs={"allow_abbrev": False},
            args=with_config_paths(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        optional = str | None
        parser.add_argument("--run", type=optional, default=None, help="folder; after the configs when null")
        parser.add_argument("--resume", default="auto", help="auto, none or a checkpoint's path")
        parser.add_argument("--ckpt_path", type=optional, default=None, help="what validate scores")
        parser.add_argument(
            "--dry_run", action=ActionYesNo, nargs="?", default=False, help="check and plan, but do nothing"
        )
        parser.add_class_arguments(CheckpointSettings, "checkpoint")
        parser.add_class_arguments(StreamingSettings, "streaming")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        if not 0 <= self.config.seed_everything < 2**32:
            raise ConfigError(f"seed_everything is {self.config.seed_everything}; use 0 to {2**32 - 1}")
        if self.num_trial_steps < 0:
            raise ConfigError(
                f"trainer.fast_dev_run is {self.num_trial_steps}; use true, or a number of steps"
            )

    def before_instantiate_classes(self) -> None:
        loggers = self.config.trainer.logger
        self.run_id = self.run.read_id() or uuid.uuid4().hex[:12]
        self.uploads_model = False
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "class_path"):
                _place_logger(logger, self.run, self.run_id)
                self.uploads_model |= _uploads_model(logger)
        if self.config.dry_run or self.num_trial_steps:
            self.config.trainer.logger = False

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.config.run or self.default_run))

    @property
    def num_trial_steps(self) -> int:
        """``trainer.fast_dev_run``: steps of a trial, which keeps nothing; 0 for a run."""
        return int(self.config.trainer.fast_dev_run)

    def instantiate_trainer(self, **_: Any) -> Any:
        """Made by ``make_trainer`` once the run folder is known."""
        return None

    def make_trainer(self, is_training: bool, measures: MoreCallbacks | None = None) -> pl.Trainer:
        """The Trainer of the run, or one that only validates and leaves the run folder alone.

        Args:
            measures: gives further callbacks of the run.

        Raises:
            ConfigError: a setting of the Trainer's that cannot be used.
        """
        settings = dict(self.config_init.trainer)
        for name, (is_bad, remedy) in UNSUPPORTED.items():
            if is_bad(settings.get(name)):
                raise ConfigError(f"trainer.{name} {settings[name]} is not supported; use {remedy}")
        if is_training:
            settings["callbacks"] = [*(settings["callbacks"] or []), *self._callbacks(measures)]
            settings["default_root_dir"] = self.run.path
            settings["enable_progress_bar"] = True  # ours, which prints lines where there is no bar
            if self.num_trial_steps:
                settings["callbacks"].append(StopAfter(self.num_trial_steps))
                settings |= trial_settings(self.num_trial_steps)
        else:
            settings |= {"enable_progress_bar": False, "logger": False}
        settings |= torchrun_devices(settings["devices"])
        leave_group_at_exit()
        try:
            settings["plugins"] = settings["plugins"] or _cluster_plugins()
            trainer = pl.Trainer(**settings)
        except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
            raise ConfigError(_trainer_refusal(error)) from error
        check_device(trainer.strategy.root_device)
        check_precision(trainer.precision, trainer.strategy.root_device)
        return trainer

    def _callbacks(self, measures: MoreCallbacks | None) -> list[pl.Callback]:
        metrics = Metrics(MetricsTable(self.run.path / "metrics.csv"))
        checkpoints = Checkpoints(self.run.checkpoints, self.config_init.checkpoint)
        more = measures(self, metrics) if measures else []  # ahead of the checkpoint of the same step
        companions = Companions(self.run.checkpoints)
        companions.watch_launcher()
        stops = [StopWhenSkipping(checkpoints), StopOnSignal(checkpoints)]
        told = LoggedRun(self.logged_settings(), self.run, self.uploads_model)
        wants_bar = self.config_init.trainer.enable_progress_bar is not False
        bar = ProgressBar(metrics, is_live=wants_bar and sys.stderr.isatty())
        # Companions come last: they watch until the last checkpoint is there.
        return [metrics, *more, checkpoints, told, *stops, bar, companions]

    def identity(self) -> dict[str, Any]:
        """What a run folder must agree on to be continued."""
        return {
            "model": self.model.model_config(self.datamodule).to_dict(),
            "optimizer": self.model.optimizer_kind,
            "init_from": self.model.init_from,
            "data_fingerprint": self.datamodule.manifest.fingerprint,
            "score_sink": self.datamodule.score_sink,
            "seed_everything": self.config.seed_everything,
        }

    def dump(self) -> str:
        """Every setting, as the YAML that makes the same run again."""
        with_nulls = {"skip_unset" if _HAS_NEW_NAMES else "skip_none": False}
        text: str = self.parser.dump(self.config, skip_link_targets=True, format="yaml", **with_nulls)
        return text

    def logged_settings(self) -> dict[str, Any]:
        """What loggers are told: every setting but their own, which may hold keys to their services."""
        settings: dict[str, Any] = yaml.safe_load(self.dump())
        del settings["trainer"]["logger"]
        return settings


MoreCallbacks = Callable[[TrainingCLI, Metrics], list[pl.Callback]]
"""What a run does besides, made of its settings: handed in by whoever may import what it needs."""


def _trainer_refusal(error: Exception) -> str:
    message = " ".join(str(error).split()).rstrip("!.")
    is_about_devices = re.search(r"(?i)devices|accelerator|backend|gpu", message)
    return f"trainer: {message}{'; sinktrain doctor shows the devices' if is_about_devices else ''}"


def _cluster_plugins() -> list[SLURMEnvironment]:
    """SLURM as Lightning finds it, less its requeueing: that saves in a signal handler, half a step or never.

    ``StopOnSignal`` saves between steps; the same command continues.
    """
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []


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
        ".*AccumulateGrad node's stream.*",  # of DDP's own making, on CUDA
    ):
        warnings.filterwarnings("ignore", message=text)


# -- loggers --------------------------------------------------------------------------------------


def _place_logger(logger: Any, run: RunFolder, run_id: str) -> None:
    """Keep a logger's files in the run folder, and a continued run in the same W&B run."""
    name = logger.class_path.rpartition(".")[2]
    if name == "WandbLogger":
        _need("wandb", "pip install 'sinktrain[wandb]'")
        placed = {"name": run.path.name, "id": run_id}
    elif name == "TensorBoardLogger":
        _need("tensorboard", "pip install tensorboard")
        placed = {"name": "tensorboard", "version": ""}
    else:
        return
    for key, value in {"save_dir": str(run.path), **placed}.items():
        logger.init_args[key] = value


def _uploads_model(logger: Any) -> bool:
    """Whether W&B is to have the model: Lightning's setting, which without its checkpoints does nothing."""
    settings = logger.get("init_args") or {}
    if not logger.class_path.endswith("WandbLogger"):
        return False
    log_model = settings.get("log_model", False)
    if log_model not in (True, False):
        raise ConfigError(f"trainer.logger: log_model {log_model} is not supported; use true (the last one)")
    if log_model and settings.get("offline"):
        raise ConfigError(
            "trainer.logger: log_model and offline do not go together; "
            "leave offline out and set WANDB_MODE=offline, and `wandb sync` uploads both"
        )
    return bool(log_model)


def _need(package: str, remedy: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"trainer.logger needs the package {package}; {remedy}, or leave that overlay out")


# -- plain messages -------------------------------------------------------------------------------


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_plain_message(message, self)) from ex

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """What Lightning 2.6.6 calls by its old name."""
        instantiate = self.instantiate if _HAS_NEW_NAMES else super().instantiate_classes
        return instantiate(cfg, **options)


_HAS_NEW_NAMES = hasattr(LightningArgumentParser, "instantiate")
"""Since jsonargparse 4.49, which warns of the old ones."""


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
    (
        r".*arguments are required: .*data\.path.*",
        "data.path is missing; pass --data.path SHARDS, made by sinktrain prepare",
    ),
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
    for pattern, plain in _PLAIN_WORDS:
        text = re.sub(pattern, plain, text)
    return text
