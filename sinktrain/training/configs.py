"""Configs by name: where the shipped ones are, which ones a command line names, the run they make."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from sinktrain.errors import ConfigError, did_you_mean


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
    names = [Path(config.removesuffix(".yaml")).name for _, _, config in _configs(args)]
    return str(Path("runs", "-".join(names) or "run"))


def with_config_paths(args: list[str]) -> list[str]:
    """The command line with the path of each config in place of its name.

    Raises:
        ConfigError: a config is not there.
    """
    resolved = list(args)
    for index, flag, config in _configs(args):
        resolved[index] = f"{flag}{find_config(config)}"
    return resolved


def _configs(args: list[str]) -> Iterator[tuple[int, str, str]]:
    """Each config named: where its argument is, what stands before the name in there, the name."""
    flag = "--config="
    for index, arg in enumerate(args):
        if arg.startswith(flag):
            yield index, flag, arg.removeprefix(flag)
        elif index and args[index - 1] in ("--config", "-c"):
            yield index, "", arg
