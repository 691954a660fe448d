"""The commands that a study is made of, as a user would type them, and where they read and write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sinktrain.data.shards import MANIFEST_FILE
from sinktrain.errors import ConfigError
from sinktrain.experiments.study_file import Settings, Study, StudyRun
from sinktrain.model.hub import is_hub_id
from sinktrain.training.configs import config_folder

STAGES = ("prepare", "train", "compare", "publish")
SINKTRAIN = [sys.executable, "-m", "sinktrain"]


@dataclass(frozen=True)
class Options:
    """How a study is carried out.

    Args:
        out: the study's folder.
        stages: of ``STAGES``.
        only: arms to train and compare; all when empty.
        seeds: the same of seeds.
        accelerator: ``cpu``, ``gpu`` or ``auto``; as the configs say when None.
        gpus_per_run: of those that are visible; 0 for all.
        text: in place of the study's.
    """

    out: Path
    stages: tuple[str, ...] = STAGES
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    accelerator: str | None = None
    gpus_per_run: int = 1
    text: str | None = None


def overlay_file(options: Options, arm: str) -> Path:
    """What stands over the configs of an arm's runs."""
    return options.out / "configs" / f"{arm}.yaml"


def text_of(study: Study, options: Options) -> str:
    """What is prepared; a path of a shipped study is that of the repository it is shipped in.

    Raises:
        ConfigError: it is not there.
    """
    text = options.text or study.text
    if text is None:
        raise ConfigError(f"the study {study.name} leaves open what to train on; give --text TEXT")
    beside = config_folder().parent / text
    if options.text is None and not Path(text).exists() and text.startswith("data/"):
        if not beside.exists():
            raise ConfigError(
                f"{text} is part of sinktrain's repository; start in a clone of it, or give --text TEXT"
            )
        return str(beside)
    if not Path(text).exists() and not is_hub_id(text):
        raise ConfigError(f"text {text}: no such file or folder; mend it, or give --text TEXT")
    return text


def shards_of(study: Study, options: Options) -> Path:
    """Where the tokens are: given as shards, or prepared into the study's folder."""
    given = options.text or study.shards
    if given is not None and (given == study.shards or Path(given, MANIFEST_FILE).is_file()):
        return Path(given)
    return options.out / "shards"


def prepare_arguments(study: Study, options: Options) -> list[str]:
    return [text_of(study, options), "--out", str(shards_of(study, options)), *_typed(study.prepare)]


def compare_arguments(study: Study, runs: Sequence[StudyRun], shards: Path, options: Options) -> list[str]:
    settings = dict(study.compare)
    more = settings.pop("text", None) or []
    texts = [str(shards), *([more] if isinstance(more, str) else more)]
    device = ["--device", "cpu"] if options.accelerator == "cpu" else []
    return [
        *(str(options.out / run.name) for run in sorted(runs, key=lambda run: study.arms.index(run.arm))),
        *(word for text in texts for word in ("--text", text)),
        *("--out", str(options.out / "compare")),
        *_typed(settings),
        *device,
    ]


def publish_arguments(study: Study, runs: Sequence[StudyRun], options: Options) -> list[str]:
    compared = options.out / "compare"
    results = ["--results", str(compared)] if compared.is_dir() else []
    return [*(str(options.out / run.name) for run in runs), *results, *_typed(study.publish)]


def fit_arguments(study: Study, run: StudyRun, shards: Path, options: Options, num_gpus: int) -> list[str]:
    several = ["ddp"] if num_gpus > 1 else []  # under what the study says of a strategy
    devices = ["--trainer.devices", str(num_gpus)] if num_gpus > 1 else []
    accelerator = ["--trainer.accelerator", options.accelerator] if options.accelerator else []
    configs = [*several, *study.base, *run.arm.configs, str(overlay_file(options, run.arm.name))]
    return [
        *(word for config in configs for word in ("--config", config)),
        *devices,
        *("--run", str(options.out / run.name), "--data.path", str(shards)),
        *("--seed_everything", str(run.seed)),
        *accelerator,
    ]


def _typed(settings: Settings) -> list[str]:
    """Options as they are typed: ``max_tokens: 500`` is ``--max-tokens 500``."""
    words: list[str] = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not False and value is not None:
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words
