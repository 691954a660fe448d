"""A study as its file says it: arms, seeds, data, and what is measured at the end."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sinktrain.errors import ConfigError, did_you_mean, first_line
from sinktrain.training.configs import config_folder, find_config

Settings = dict[str, Any]

FOLDER = ("compare", "configs", "former", "logs", "shards", "slurm.sh", "state", "study.json", "study.yaml")
"""What else lies where runs' folders do, so that no arm can be called so."""

KEYS = ("about", "text", "shards", "prepare", "base", "settings", "arms", "seeds", "compare", "publish")
PREPARE = (
    *("vocab_size", "tokenizer", "val_fraction", "streameval_share", "max_tokens", "workers"),
    *("text_column", "subset", "split", "revision"),
)
COMPARE = (
    *("text", "layouts", "policies", "tasks", "quantize", "max_tokens", "streams", "recompute_tokens"),
    *("verify", "dtype", "wandb"),
)
PUBLISH = ("repo_id", "private", "revision", "tag", "checkpoints", "license", "collection", "replace")


@dataclass(frozen=True)
class Arm:
    """What is trained alike but for one thing.

    Args:
        name: also its runs' folders.
        configs: overlays, by name or path.
        settings: of ``sinktrain fit``, nested as in its configs; over everything else.
    """

    name: str
    configs: tuple[str, ...] = ()
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRun:
    """One arm under one seed."""

    arm: Arm
    seed: int
    name: str


@dataclass(frozen=True)
class Study:
    """Arms x seeds, trained alike, then compared.

    Args:
        name: of the file.
        text: what ``sinktrain prepare`` reads, with the options ``prepare``.
        shards: prepared already. Where both are None, whoever starts the study names a text.
        base: configs of all arms, and ``settings`` over them.
        compare, publish: options of these commands, by their names without dashes.
    """

    name: str
    arms: tuple[Arm, ...]
    base: tuple[str, ...]
    seeds: tuple[int, ...] = (1234,)
    about: str = ""
    text: str | None = None
    shards: str | None = None
    prepare: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    compare: Settings = field(default_factory=dict)
    publish: Settings = field(default_factory=dict)

    @property
    def runs(self) -> list[StudyRun]:
        """Seed by seed, so that a study that is cut off has all arms of its first seeds."""
        return [
            StudyRun(arm, seed, arm.name if len(self.seeds) == 1 else f"{arm.name}-{seed}")
            for seed in self.seeds
            for arm in self.arms
        ]

    def overlay(self, arm: Arm) -> Settings:
        """What stands over the configs of an arm's runs."""
        return merged(self.settings, arm.settings, {"model": {"arm": arm.name}})

    def recipe(self, run: StudyRun) -> Settings:
        """All that an arm's run is trained with: its configs, merged, and its seed."""
        configs = [_read_yaml(find_config(name)) for name in (*self.base, *run.arm.configs)]
        return merged(*configs, self.overlay(run.arm), {"seed_everything": run.seed})


def shipped_studies() -> dict[str, Path]:
    """The studies that come with sinktrain, by name."""
    return {path.stem: path for path in sorted((config_folder() / "studies").glob("*.yaml"))}


def read_study(name: str) -> Study:
    """A study by its file, or by the name of a shipped one.

    Raises:
        ConfigError: it is not there, or does not say a study.
    """
    path = Path(name) if Path(name).is_file() else shipped_studies().get(name)
    if path is None:
        hint = did_you_mean(name, shipped_studies()) or f"; there are {', '.join(shipped_studies())}"
        raise ConfigError(f"{name}: no such file, and no shipped study of that name{hint}")
    said = _read_yaml(path)
    try:
        return _parsed(path.stem, said)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def digest(recipe: Settings, data_fingerprint: str) -> str:
    """What a finished run is known by: another recipe or other data have another digest."""
    said = json.dumps([recipe, data_fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def merged(*settings: Mapping[str, Any]) -> Settings:
    """Nested settings, later ones over earlier ones."""
    result: Settings = {}
    for one in settings:
        for key, value in one.items():
            below = result.get(key)
            is_nested = isinstance(value, Mapping) and isinstance(below, Mapping)
            result[key] = merged(below, value) if is_nested else value  # type: ignore[arg-type]
    return result


def _read_yaml(path: Path) -> Settings:
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path} is no YAML file: {line}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML file: {first_line(error)}") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} holds no names and values")
    return said


def _parsed(name: str, said: Settings) -> Study:
    _check_keys("", said, KEYS)
    for part, known in (("prepare", PREPARE), ("compare", COMPARE), ("publish", PUBLISH)):
        _check_keys(f"{part}.", _mapping(part, said.get(part)), known)
    if "text" in said and "shards" in said:
        raise ConfigError("names both text, which is prepared, and shards, which are there; leave one out")
    for key in ("text", "shards"):
        if not isinstance(said.get(key), str | None):
            raise ConfigError(f"{key} is {said[key]!r}; name one file or folder")
    for layout in str((said.get("compare") or {}).get("layouts", 1)).split(","):
        if not re.fullmatch(r"\s*\d+(\+\d+)?\s*", layout):
            raise ConfigError(
                f"compare.layouts: {layout} is no layout; write sinks + window as 1+127, or N alone"
            )
    if said.get("publish") and "repo_id" not in said["publish"]:
        raise ConfigError("publish needs a repo_id: ORG/NAME")
    arms = [_arm(*one) for one in _mapping("arms", said.get("arms")).items()]
    if not arms:
        raise ConfigError("arms names what is compared, such as  arms: {vanilla: {}, sink: {config: sink}}")
    return Study(
        name=name,
        arms=tuple(arms),
        base=_names("base", said.get("base")),
        seeds=_seeds(said.get("seeds", [1234])),
        about=str(said.get("about", "")),
        text=said.get("text"),
        shards=said.get("shards"),
        **{part: _mapping(part, said.get(part)) for part in ("prepare", "settings", "compare", "publish")},
    )


def _arm(name: object, said: object) -> Arm:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", str(name)):
        raise ConfigError(f"arms.{name}: use small letters, digits, - and _, as in folders")
    if name in FOLDER:
        raise ConfigError(f"arms.{name}: the study's folder has its own {name}; choose another name")
    settings = _mapping(f"arms.{name}", said)
    configs = settings.pop("config", None)
    return Arm(str(name), _names(f"arms.{name}.config", configs, may_be_empty=True), settings)


def _names(key: str, said: object, may_be_empty: bool = False) -> tuple[str, ...]:
    """One config or several, all of which are there."""
    names = [said] if isinstance(said, str) else said or []
    if not isinstance(names, list) or not (names or may_be_empty):
        raise ConfigError(f"{key} is {said!r}; name a config, or a list of them: [quickstart, sink]")
    for name in names:
        find_config(str(name))
    return tuple(map(str, names))


def _seeds(said: object) -> tuple[int, ...]:
    seeds = said if isinstance(said, list) else [said]
    if (
        not seeds
        or len(set(map(str, seeds))) < len(seeds)
        or any(type(seed) is not int or seed < 1 for seed in seeds)
    ):
        raise ConfigError(f"seeds is {said!r}; use a list of different numbers from 1 on, such as [1, 2, 3]")
    return tuple(seeds)


def _mapping(key: str, said: object) -> Settings:
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise ConfigError(f"{key} is {said!r}; it should hold names and values")
    return dict(said)


def _check_keys(prefix: str, said: Iterable[object], known: Sequence[str]) -> None:
    for key in map(str, said):
        if key not in known:
            raise ConfigError(f'no "{prefix}{key}"{did_you_mean(key, known)}; there are {", ".join(known)}')
