"""What a study would take, before it starts: tokens, hours, disk, by arithmetic on its configs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from sinktrain.data.shards import read_manifest
from sinktrain.errors import ConfigError, DataError, first_line
from sinktrain.experiments.study_commands import Options, shards_of, text_of
from sinktrain.experiments.study_file import Arm, Settings, Study, StudyRun, digest
from sinktrain.experiments.study_training import is_done
from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import ModelConfig, NetworkConfig
from sinktrain.training.dry_run import hours, millions, on_disk
from sinktrain.training.memory import checkpoint_bytes, num_parameters
from sinktrain.training.throughput import flops_per_token, peak_flops

ASSUMED_MFU = {"small": 0.15, "large": 0.40}
"""In the causal convention: of models below 100m parameters, whose steps are short, and of larger ones."""

SMALL = 100e6
PYTHIA_ROWS = 50_304
"""Of a vocabulary that is not there yet, when its size is not told."""

CHECKPOINTS = 3
"""At once in a run folder, while the newest is being written."""


@dataclass(frozen=True)
class Planned:
    """One run, on one device; ``hours`` are None where the device's speed is unknown."""

    run: str
    is_done: bool
    parameters: int
    tokens: int
    flops: float
    disk_bytes: int
    hours: float | None


def plan_study(study: Study, runs: Sequence[StudyRun], options: Options) -> list[Planned]:
    """Each run as it would be; nothing is read but configs, and nothing is written.

    Raises:
        ConfigError, DataError: an arm has a setting that ``sinktrain fit`` refuses, or its configs leave out
            what it is; there is no such text, or none is named.
    """
    shards = shards_of(study, options)
    if shards == options.out / "shards":
        text_of(study, options)
    else:
        read_manifest(shards)
    for arm in {run.arm.name: run.arm for run in runs}.values():
        _check_settings(study, arm)
    return [_planned(study, run, options) for run in runs]


def _check_settings(study: Study, arm: Arm) -> None:
    """Let ``sinktrain fit`` read an arm's configs, as ``--print_config`` has it do."""
    from sinktrain.training.settings import TrainingCLI

    with TemporaryDirectory(prefix="sinktrain-") as folder:
        overlay = Path(folder, f"{arm.name}.yaml")
        overlay.write_text(yaml.safe_dump(study.overlay(arm)), encoding="utf-8")
        configs = [word for name in (*study.base, *arm.configs, overlay) for word in ("--config", str(name))]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                TrainingCLI([*configs, "--print_config"])
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from error


def _planned(study: Study, run: StudyRun, options: Options) -> Planned:
    recipe = study.recipe(run)
    data, rows = _data(study, options)
    try:
        network = NetworkConfig(**{"vocab_size": rows} | recipe["model"]["network"])
        max_steps = int(recipe["trainer"]["max_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{run.name}: its configs need a model.network and a trainer.max_steps ({first_line(error)}); "
            "name a base such as small"
        ) from error
    model = empty_model(ModelConfig(network))
    seq_len = _data_setting(recipe, "seq_len", 2048)
    tokens = max_steps * _data_setting(recipe, "global_batch", 1024) * seq_len
    flops = tokens * flops_per_token(network, model.config.vocab_size, seq_len, is_causal=True)
    peak = peak_flops(torch.device("cuda")) if _is_on_gpu(recipe, options) else None
    mfu = ASSUMED_MFU["small" if num_parameters(model) < SMALL else "large"]
    return Planned(
        run=run.name,
        is_done=data is not None and is_done(run, digest(recipe, data), options),
        parameters=num_parameters(model),
        tokens=tokens,
        flops=flops,
        disk_bytes=CHECKPOINTS * checkpoint_bytes(model),
        hours=None if peak is None else flops / (mfu * peak) / 3600,
    )


def _data(study: Study, options: Options) -> tuple[str | None, int]:
    """The fingerprint of the shards, if they are there, and the vocabulary's rows."""
    try:
        manifest = read_manifest(shards_of(study, options))
    except DataError:
        return None, int(study.prepare.get("vocab_size", PYTHIA_ROWS))
    return manifest.fingerprint, manifest.padded_vocab_size


def _data_setting(recipe: Settings, name: str, default: int) -> int:
    return int(recipe.get("data", {}).get(name, default))


def _is_on_gpu(recipe: Settings, options: Options) -> bool:
    accelerator = options.accelerator or recipe.get("trainer", {}).get("accelerator", "auto")
    return accelerator != "cpu" and torch.cuda.is_available()


def as_table(rows: Sequence[Planned]) -> str:
    """The plan in lines, with the sum of what is still to be done."""
    left = [row for row in rows if not row.is_done]
    lines = [
        f"{row.run:<16} {millions(row.parameters):>8} parameters  {row.tokens / 1e6:>10,.1f}M tokens  "
        f"{on_disk(row.disk_bytes):>9}  {'finished' if row.is_done else _hours([row])}"
        for row in rows
    ]
    total = (
        f"{len(left)} of {len(rows)} runs to train: {sum(row.tokens for row in left) / 1e6:,.1f}M tokens, "
        f"{on_disk(sum(row.disk_bytes for row in rows))} of disk, {_hours(left)} on one device"
    )
    return "\n".join([*lines, total])


def _hours(rows: Sequence[Planned]) -> str:
    known = [row.hours for row in rows if row.hours is not None]
    if len(known) < len(rows):
        return "time unknown for this device"
    return f"about {hours(3600 * sum(known))}"
