"""A whole experiment: prepare, train what is missing, compare, and publish if asked to.

A study's folder holds ``study.yaml``, ``configs/`` (what stands over the configs of each arm), ``shards/``,
a run folder for each arm and seed, ``logs/``, ``state/`` (the recipe that each run was begun with),
``former/`` (runs of other recipes), ``compare/`` and ``study.json``. It may be moved; nothing in it depends
on where it is.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from sinktrain import __version__
from sinktrain.data.shards import read_manifest
from sinktrain.errors import ConfigError, SinktrainError
from sinktrain.experiments.study_commands import (
    SINKTRAIN,
    Options,
    compare_arguments,
    overlay_file,
    prepare_arguments,
    publish_arguments,
    shards_of,
)
from sinktrain.experiments.study_file import Study, StudyRun, read_study
from sinktrain.experiments.study_pool import call
from sinktrain.experiments.study_training import adopt, devices_of, is_done, recipes, train
from sinktrain.files import write_json, write_text
from sinktrain.training.run import RunFolder

SCHEMA_VERSION = 1


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
    trains = "train" in options.stages
    if trains:
        devices_of(options)
    write_files(study, options)
    if prepares:
        _command("prepare", *preparing)
    recipe_of = recipes(study, read_manifest(shards).fingerprint)
    adopt(study, recipe_of, options)
    failed = train(study, runs, recipe_of, shards, options) if trains else []
    done = [run for run in study.runs if is_done(run, recipe_of[run.name], options)]
    others = [run.name for run in study.runs if run not in done and _is_finished(run, options)]
    if others:
        words = "trained with another recipe; left out until trained anew"
        print(f"{', '.join(others)}: {words}", file=sys.stderr, flush=True)
    _write_summary(study, done, options)
    if "compare" in options.stages and len(done) > 1:
        _compare(study, done, recipe_of, options)
    elif "compare" in options.stages:
        print(f"{len(done)} run finished: nothing to compare yet", file=sys.stderr, flush=True)
    if failed:
        raise StudyError(
            f"{', '.join(failed)} failed, see {options.out / 'logs'}; the same command tries again"
        )
    if "publish" in options.stages and study.publish:
        _command("publish", *publish_arguments(study, done, options))


def _compare(study: Study, done: list[StudyRun], recipe_of: Mapping[str, str], options: Options) -> None:
    """Compare the runs; what was compared alike before is shown again, with the times measured then."""
    results, note = options.out / "compare" / "results.json", options.out / "state" / "compare.json"
    recipes_of_done = {run.name: recipe_of[run.name] for run in done}
    what = {"runs": recipes_of_done, "compare": study.compare, "accelerator": options.accelerator}
    what["sinktrain"] = __version__
    if results.is_file() and _noted(note) == what:
        _command("compare", "--from-results", str(results), "--out", str(results.parent))
        return
    _command("compare", *compare_arguments(study, done, shards_of(study, options), options))
    write_json(note, what)


def _noted(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing was, or a damaged file
        return None


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


# -- files ----------------------------------------------------------------------------------------


def write_files(study: Study, options: Options) -> None:
    """``study.yaml`` and what stands over each arm's configs; what says the same already is not touched."""
    if not _says(options.out / "study.yaml", study):
        _write_yaml(options.out / "study.yaml", _as_file(study))
    for arm in study.arms:
        _write_yaml(overlay_file(options, arm.name), study.overlay(arm))


def _says(path: Path, study: Study) -> bool:
    """Whether the file is this study, such as the user's own, with comments."""
    try:
        return path.is_file() and replace(read_study(str(path)), name=study.name) == study
    except ConfigError:
        return False


def _as_file(study: Study) -> dict[str, Any]:
    said = asdict(study)
    said["arms"] = {arm.name: {"config": list(arm.configs), **arm.settings} for arm in study.arms}
    for key in ("base", "seeds"):
        said[key] = list(said[key])
    said.pop("name")
    return {key: value for key, value in said.items() if value}


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def missing_runs(study: Study, runs: Sequence[StudyRun], options: Options) -> list[StudyRun]:
    """Those that are not done, once the text is prepared."""
    recipe_of = recipes(study, read_manifest(shards_of(study, options)).fingerprint)
    return [run for run in runs if not is_done(run, recipe_of[run.name], options)]


def _is_finished(run: StudyRun, options: Options) -> bool:
    return RunFolder(options.out / run.name).is_finished(0)


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


# -- commands -------------------------------------------------------------------------------------


def _command(name: str, *arguments: str) -> None:
    """Another command of ours, in its own process, its output ours.

    Raises:
        StudyError: it failed, and has said why.
        StudyStopped: by a signal, when the command has ended too.
    """
    print(f"sinktrain {name} {shlex.join(arguments)}", file=sys.stderr, flush=True)
    if call([*SINKTRAIN, name, *arguments]):
        raise StudyError(f"sinktrain {name} failed; the same command tries again")
