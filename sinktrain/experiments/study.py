"""A whole experiment: prepare, train what is missing, compare, and publish if asked to.

A study's folder holds ``study.yaml``, ``configs/`` (what stands over the configs of each arm), ``shards/``,
a run folder for each arm and seed, ``logs/``, ``state/`` (which runs are finished, and with which recipe),
``compare/`` and ``study.json``. It may be moved; nothing in it depends on where it is.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sinktrain.data.shards import MANIFEST_FILE, read_manifest
from sinktrain.errors import ConfigError, SinktrainError
from sinktrain.experiments.study_board import StudyBoard
from sinktrain.experiments.study_file import Settings, Study, StudyRun, digest
from sinktrain.experiments.study_pool import Job, train_all
from sinktrain.files import write_json, write_text
from sinktrain.training.configs import config_folder
from sinktrain.training.run import RunFolder

SCHEMA_VERSION = 1
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


class StudyError(SinktrainError):
    """Some runs failed, or a command of the study; the others' results stand."""


def run_study(study: Study, options: Options) -> None:
    """Carry out what is not done yet.

    Raises:
        SinktrainError: a mistake in the study, found before anything starts; or what failed, at the end.
        StudyStopped: by a signal; the same call continues.
    """
    runs = chosen_runs(study, options)
    shards = shards_of(study, options)
    prepares = "prepare" in options.stages and shards == options.out / "shards"
    preparing = prepare_arguments(study, options) if prepares else []
    if not prepares:
        read_manifest(shards)
    write_files(study, options)
    if prepares:
        _command("prepare", *preparing)
    failed = _train(study, runs, shards, options) if "train" in options.stages else []
    finished = [run for run in study.runs if RunFolder(options.out / run.name).is_finished(0)]
    _write_summary(study, finished, options)
    if "compare" in options.stages and len(finished) > 1:
        _command("compare", *compare_arguments(study, finished, shards, options))
    if failed:
        raise StudyError(
            f"{', '.join(failed)} failed, see {options.out / 'logs'}; the same command tries again"
        )
    if "publish" in options.stages and study.publish:
        _command("publish", *publish_arguments(study, finished, options))


# -- what is asked --------------------------------------------------------------------------------


def chosen_runs(study: Study, options: Options) -> list[StudyRun]:
    """The runs of the arms and seeds that are asked for.

    Raises:
        ConfigError: the study has no such arm or seed.
    """
    for option, asked, there in (
        ("--only", options.only, [arm.name for arm in study.arms]),
        ("--seeds", options.seeds, list(study.seeds)),
    ):
        for one in asked:
            if one not in there:
                raise ConfigError(f"{option} {one}: the study has {', '.join(map(str, there))}")
    return [
        run
        for run in study.runs
        if run.arm.name in (options.only or [run.arm.name]) and run.seed in (options.seeds or [run.seed])
    ]


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
    models = [str(options.out / run.name) for run in runs]
    return [*models, "--results", str(options.out / "compare"), *_typed(study.publish)]


def fit_arguments(study: Study, run: StudyRun, shards: Path, options: Options, num_gpus: int) -> list[str]:
    several = ["--config", "ddp", "--trainer.devices", str(num_gpus)] if num_gpus > 1 else []
    accelerator = ["--trainer.accelerator", options.accelerator] if options.accelerator else []
    configs = [*study.base, *run.arm.configs, str(_overlay_file(options, run.arm.name))]
    return [
        *(word for config in configs for word in ("--config", config)),
        *several,
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


# -- files ----------------------------------------------------------------------------------------


def write_files(study: Study, options: Options) -> None:
    """``study.yaml`` and what stands over each arm's configs; what is the same already is not touched."""
    said = asdict(study)
    said["arms"] = {arm.name: {"config": list(arm.configs), **arm.settings} for arm in study.arms}
    for key in ("base", "seeds"):
        said[key] = list(said[key])
    said.pop("name")
    files = {options.out / "study.yaml": {key: value for key, value in said.items() if value}}
    files |= {_overlay_file(options, arm.name): study.overlay(arm) for arm in study.arms}
    for path, content in files.items():
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _overlay_file(options: Options, arm: str) -> Path:
    return options.out / "configs" / f"{arm}.yaml"


def _write_summary(study: Study, runs: Sequence[StudyRun], options: Options) -> None:
    """``study.json``: what each finished run took and came to."""
    write_json(
        options.out / "study.json",
        {"schema_version": SCHEMA_VERSION, "study": study.name}
        | {"runs": [_summary(run, options.out / run.name) for run in runs]},
    )


def _summary(run: StudyRun, folder: Path) -> dict[str, Any]:
    manifest = RunFolder(folder).read_manifest() or {}
    facts = ("global_step", "tokens_seen", "val_loss_nats", "hardware")
    return {"run": run.name, "arm": run.arm.name, "seed": run.seed} | {
        name: manifest.get(name) for name in facts
    }


# -- training -------------------------------------------------------------------------------------


def _train(study: Study, runs: Sequence[StudyRun], shards: Path, options: Options) -> list[str]:
    """Train what is not finished; returns the names of what failed."""
    data = read_manifest(shards).fingerprint
    digests = {run.name: digest(study.recipe(run), data) for run in runs}
    missing = [run for run in runs if not is_done(run, digests[run.name], options)]
    devices, num_gpus = _devices(options)
    jobs = [
        Job(
            run.name,
            [*SINKTRAIN, "fit", *fit_arguments(study, run, shards, options, num_gpus)],
            options.out / run.name,
            options.out / "logs" / f"{run.name}.log",
        )
        for run in missing
    ]

    def note(job: Job) -> None:
        if job.state == "finished":
            write_json(_state_file(options, job.name), {"recipe": digests[job.name]})

    train_all(jobs, devices, StudyBoard(study.name, len(devices), len(runs) - len(missing)), note)
    return [job.name for job in jobs if job.state != "finished"]


def is_done(run: StudyRun, recipe: str, options: Options) -> bool:
    try:
        state = json.loads(_state_file(options, run.name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(state.get("recipe") == recipe and RunFolder(options.out / run.name).is_finished(0))


def _state_file(options: Options, run: str) -> Path:
    return options.out / "state" / f"{run}.json"


def _devices(options: Options) -> tuple[list[str | None], int]:
    """What ``CUDA_VISIBLE_DEVICES`` is for each run at a time, and the GPUs of a run."""
    if options.accelerator == "cpu":
        return [None], 1
    import torch

    num_gpus = torch.cuda.device_count()
    per_run = options.gpus_per_run or num_gpus
    if num_gpus < 2 or per_run >= num_gpus:
        return [None], max(1, min(per_run, num_gpus))
    starts = range(0, num_gpus - per_run + 1, per_run)
    return [",".join(map(str, range(start, start + per_run))) for start in starts], per_run


def _command(name: str, *arguments: str) -> None:
    """Another command of ours, in its own process, its output ours.

    Raises:
        StudyError: it failed, and has said why.
    """
    print(f"sinktrain {name} {shlex.join(arguments)}", file=sys.stderr, flush=True)
    code = subprocess.call([*SINKTRAIN, name, *arguments])
    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        raise StudyError(f"sinktrain {name} failed; the same command tries again")
