"""The run folder: what a run is, whether it may go on here, and what it leaves behind.

``config.yaml``, ``metrics.csv``, ``manifest.json``, ``tokenizer.json`` and ``checkpoints/`` make a
run folder movable and self-contained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinktrain.errors import ConfigError
from sinktrain.files import write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def read_manifest(self) -> dict[str, Any] | None:
        """What is known of the run, or None where there is none yet."""
        if not self.manifest.exists():
            return None
        try:
            value: dict[str, Any] = json.loads(self.manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.manifest} is not readable ({error}); choose another --run") from error
        return value

    def read_id(self) -> str | None:
        """The id drawn when the run began; loggers know it by this."""
        manifest = self.read_manifest()
        return None if manifest is None else manifest.get("run_id")

    def is_finished(self, max_steps: int) -> bool:
        """Whether a run of that many steps has nothing left to do."""
        manifest = self.read_manifest() or {}
        return bool(manifest.get("is_finished")) and manifest["global_step"] >= max_steps

    def write_manifest(self, identity: dict[str, Any], **facts: Any) -> None:
        write_json(self.manifest, {"format_version": FORMAT_VERSION, "identity": identity, **facts})

    def checkpoint_to_resume(self, resume: str, identity: dict[str, Any]) -> Path | None:
        """The checkpoint that a run continues from; None starts afresh.

        Args:
            resume: ``auto``, ``none`` or a checkpoint's path.
            identity: what the run is; a folder made by another is refused.

        Raises:
            ConfigError: the folder holds something else, or the checkpoint is missing.
        """
        self._check_is_ours(resume, identity)
        if resume == "none":
            return None
        if resume == "auto":
            if self.last.is_symlink() and not self.last.exists():
                raise ConfigError(
                    f"{self.last} names {self.last.readlink()}, which is gone; pass --resume PATH"
                )
            return self.last if self.last.exists() else None
        if not Path(resume).is_file():
            raise ConfigError(
                f"--resume {resume}: there is no such checkpoint; use auto, none or a checkpoint's path"
            )
        return Path(resume)

    def prepare(self, tokenizer: Path) -> None:
        """Make the folder, with the tokenizer that its model will need."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if tokenizer.exists():
            shutil.copyfile(tokenizer, self.path / "tokenizer.json")

    def _check_is_ours(self, resume: str, identity: dict[str, Any]) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"--run {self.path} is a file; choose another folder")
        manifest = self.read_manifest()
        if manifest is None:
            if any(self.path.iterdir()):
                raise ConfigError(
                    f"--run {self.path} holds something that is not a run; choose another folder"
                )
            return
        if resume == "none":
            raise ConfigError(
                f"--run {self.path} holds a run; choose another folder, or continue it (--resume auto)"
            )
        found = differences(manifest.get("identity", {}), identity)
        if found:
            raise ConfigError(f"--run {self.path} was made with {found}; choose another --run")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, as ``name old, not new; …``; empty if nothing does."""
    return "; ".join(_differences(old, new, prefix=""))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[str]:
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif key == "data_fingerprint" and before != after:
            yield "another corpus (data.path)"
        elif before != after:
            yield f"{prefix}{key} {before}, not {after}"
