"""The settings of a run: parsed and checked by LightningCLI; the Trainer that they make."""

from __future__ import annotations

import logging
import sys
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ActionYesNo
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sinktrain.data.datamodule import WindowData
from sinktrain.errors import ConfigError
from sinktrain.training.checks import check_device, check_precision
from sinktrain.training.companions import Companions
from sinktrain.training.configs import default_run, with_config_paths
from sinktrain.training.launchers import leave_group_at_exit, torchrun_devices
from sinktrain.training.loggers import LoggedRun, place_loggers
from sinktrain.training.metrics import Metrics, ProgressBar
from sinktrain.training.metrics_table import MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.plain_messages import HAS_NEW_NAMES, PlainParser
from sinktrain.training.run import RunFolder
from sinktrain.training.saving import Checkpoints, CheckpointSettings
from sinktrain.training.stopping import StopOnSignal, StopWhenSkipping
from sinktrain.training.trainer_settings import TRAINER_DEFAULTS, check_trainer, trainer_refusal
from sinktrain.training.trial import StopAfter, TrialBar, trial_settings


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
    title: str
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
            parser_class=PlainParser,
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
        if self.config.trainer.fast_dev_run < 0:
            raise ConfigError(
                f"trainer.fast_dev_run is {self.config.trainer.fast_dev_run}; use true, or a number of steps"
            )
        self.title = f"a trial of {self.run.path}" if self.num_trial_steps else str(self.run.path)

    def before_instantiate_classes(self) -> None:
        self.run_id = self.run.read_id() or uuid.uuid4().hex[:12]
        self.uploads_model = place_loggers(self.config.trainer.logger, self.run, self.run_id)
        if self.config.dry_run or self.num_trial_steps:
            self.config.trainer.logger = False

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.config.run or self.default_run))

    @property
    def num_trial_steps(self) -> int:
        """``trainer.fast_dev_run``: steps of a trial, which keeps nothing; 0 for a run, or a plan of one."""
        return 0 if self.config.dry_run else int(self.config.trainer.fast_dev_run)

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
        check_trainer(settings)
        if is_training:
            settings["callbacks"] = [*(settings["callbacks"] or []), *self._callbacks(measures)]
            settings["default_root_dir"] = self.run.path
            settings["enable_progress_bar"] = True  # ours, which prints lines where there is no bar
            settings["fast_dev_run"] = False  # a trial is ours too
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
            raise ConfigError(trainer_refusal(error)) from error
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
        is_live = wants_bar and sys.stderr.isatty()
        steps = self.num_trial_steps
        bar = TrialBar(metrics, is_live, steps) if steps else ProgressBar(metrics, is_live)
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
            "window": self.model.window,
            "mask_documents": self.model.mask_documents,
            "seed_everything": self.config.seed_everything,
        }

    def dump(self) -> str:
        """Every setting, as the YAML that makes the same run again."""
        with_nulls = {"skip_unset" if HAS_NEW_NAMES else "skip_none": False}
        text: str = self.parser.dump(self.config, skip_link_targets=True, format="yaml", **with_nulls)
        return text

    def logged_settings(self) -> dict[str, Any]:
        """What loggers are told: every setting but their own, which may hold keys to their services."""
        settings: dict[str, Any] = yaml.safe_load(self.dump())
        del settings["trainer"]["logger"]
        return settings


MoreCallbacks = Callable[[TrainingCLI, Metrics], list[pl.Callback]]
"""What a run does besides, made of its settings: handed in by whoever may import what it needs."""


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
