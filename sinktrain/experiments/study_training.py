"""The training of a study's runs: which are done, and the jobs and devices of those that are not.

``state/RUN.json`` names the recipe that a run's folder was begun with. One that was begun with another recipe
is moved to ``former/`` and trained anew: otherwise it would go on from there, or count as finished.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sinktrain.errors import ConfigError
from sinktrain.experiments.study_board import StudyBoard
from sinktrain.experiments.study_commands import SINKTRAIN, Options, fit_arguments
from sinktrain.experiments.study_file import Study, StudyRun, digest
from sinktrain.experiments.study_pool import Job, is_free, train_all
from sinktrain.files import write_json
from sinktrain.training.run import RunFolder


def recipes(study: Study, data_fingerprint: str) -> dict[str, str]:
    """The digest of each run's recipe, by the run's name."""
    return {run.name: digest(study.recipe(run), data_fingerprint) for run in study.runs}


def is_done(run: StudyRun, recipe: str, options: Options) -> bool:
    """Whether it was trained to its end, with this recipe."""
    return _begun_with(run.name, options) == recipe and RunFolder(options.out / run.name).is_finished(0)


def adopt(study: Study, recipe_of: Mapping[str, str], options: Options) -> None:
    """Keep what was trained when seeds join one, or leave it: ``vanilla`` becomes ``vanilla-1``, and back."""
    names = {run.name for run in study.runs}
    for run in study.runs:
        numbered = f"{run.arm.name}-{run.seed}"
        before = run.arm.name if run.name == numbered else numbered
        folder, there = options.out / run.name, options.out / before
        is_it = before not in names and _begun_with(before, options) == recipe_of[run.name]
        if is_it and there.is_dir() and not folder.exists() and is_free(there):
            there.rename(folder)
            _state_file(before, options).rename(_state_file(run.name, options))


def train(
    study: Study, runs: Sequence[StudyRun], recipe_of: Mapping[str, str], shards: Path, options: Options
) -> list[str]:
    """Train what is not done.

    Returns:
        The names of the runs that still are not: they failed, or were ended by something else.
    """
    missing = [run for run in runs if not is_done(run, recipe_of[run.name], options)]
    devices, num_gpus = devices_of(options)
    jobs = [
        Job(
            run.name,
            [*SINKTRAIN, "fit", *fit_arguments(study, run, shards, options, num_gpus)],
            options.out / run.name,
            options.out / "logs" / f"{run.name}.log",
        )
        for run in missing
    ]
    board = StudyBoard(study.name, len(devices), len(runs) - len(missing))
    train_all(jobs, devices, board, lambda job: begin(job.name, recipe_of[job.name], options))
    return [run.name for run in missing if not is_done(run, recipe_of[run.name], options)]


def begin(run: str, recipe: str, options: Options) -> None:
    """Note the recipe that the run's folder is for; what was begun with another one makes room."""
    before = _begun_with(run, options)
    if before == recipe:
        return
    folder = options.out / run
    if before is not None and folder.exists():
        former = options.out / "former" / f"{run}-{before}"
        while former.exists():
            former = former.with_name(f"{former.name}-again")
        former.parent.mkdir(exist_ok=True)
        os.rename(folder, former)
        print(f"{run}: was trained with another recipe, now in {former}", file=sys.stderr, flush=True)
    write_json(_state_file(run, options), {"recipe": recipe})


def _begun_with(run: str, options: Options) -> str | None:
    try:
        said = json.loads(_state_file(run, options).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(said["recipe"]) if isinstance(said, dict) and "recipe" in said else None


def _state_file(run: str, options: Options) -> Path:
    return options.out / "state" / f"{run}.json"


def devices_of(options: Options) -> tuple[list[str | None], int]:
    """What ``CUDA_VISIBLE_DEVICES`` is for each run at a time, and the GPUs of a run.

    GPUs are taken from those that the variable names already: the others are somebody else's.

    Raises:
        ConfigError: a run is to have more GPUs than there are.
    """
    if options.accelerator == "cpu":
        return [None], 1
    import torch

    num_gpus = torch.cuda.device_count()
    per_run = options.gpus_per_run or num_gpus
    if per_run > max(1, num_gpus):
        raise ConfigError(f"--gpus-per-run {per_run}: of GPUs there are {num_gpus} here; use all, or fewer")
    if per_run >= num_gpus:
        return [None], max(1, num_gpus)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:num_gpus] if named else [str(gpu) for gpu in range(num_gpus)]
    starts = range(0, num_gpus - per_run + 1, per_run)
    return [",".join(gpus[start : start + per_run]) for start in starts], per_run
