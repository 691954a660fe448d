"""The run folder: what a run is, whether it may go on here, and what it leaves behind.

``config.yaml``, ``metrics.csv``, ``manifest.json``, ``tokenizer.json`` and ``checkpoints/`` make a
run folder movable and self-contained.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinktrain.errors import ConfigError
from sinktrain.files import write_json

FORMAT_VERSION = 1
LOCK = ".lock"
ONCE_IMPLIED = {"optimizer": "adamw", "mask_documents": False}
"""What runs were made with, and did not write down, before there was a choice."""


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

    def read_hardware(self) -> dict[str, Any] | None:
        """``device``, ``num_devices``, ``train_seconds`` of a finished run; None where it does not tell."""
        try:
            told = json.loads(self.manifest.read_text(encoding="utf-8"))["hardware"]
            hardware = {
                "device": str(told["device"]),
                "num_devices": int(told["num_devices"]),
                "train_seconds": float(told["train_seconds"]),
            }
        except (OSError, ValueError, KeyError, TypeError):  # no manifest, a damaged or an older one
            return None
        return hardware

    def read_id(self) -> str | None:
        """The id drawn when the run began; loggers know it by this."""
        manifest = self.read_manifest()
        return None if manifest is None else manifest.get("run_id")

    def is_finished(self, max_steps: int) -> bool:
        """Whether a run of that many steps has nothing left to do."""
        manifest = self.read_manifest() or {}
        return bool(manifest.get("is_finished")) and manifest["global_step"] >= max_steps

    def resumed_from(self, resume: str) -> str | None:
        """The checkpoint that the user last named for the run to go on from, ``resume`` being asked now."""
        if resume not in ("auto", "none"):
            return str(Path(resume).resolve())
        return (self.read_manifest() or {}).get("resumed_from")

    def has_resumed(self, resume: str) -> bool:
        """Whether the run went on from that checkpoint before: the same command then continues."""
        return (self.read_manifest() or {}).get("resumed_from") == str(Path(resume).resolve())

    def write_manifest(self, identity: dict[str, Any], **facts: Any) -> None:
        write_json(self.manifest, {"format_version": FORMAT_VERSION, "identity": identity, **facts})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes out until the end of this one, however it comes.

        Raises:
            ConfigError: another process trains there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = self._lock()
        try:
            yield
        finally:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(descriptor)

    def _lock(self) -> int:
        """A descriptor that holds the lock, which the kernel releases when the process dies."""
        while True:
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._hold(descriptor)
            if _is_same_file(descriptor, self.path / LOCK):  # or its last holder has just removed it
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
            os.close(descriptor)

    def _hold(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"--run {self.path}: {holder} trains there; wait for it, or choose another --run"
            ) from None
        except OSError:  # a file system without locks
            return

    def prepare(self, tokenizer: Path) -> None:
        """Make the folder, with the tokenizer that its model will need; what killed writers left goes."""
        for path in self.path.iterdir():
            if _is_leftover(path):
                path.unlink()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if tokenizer.exists():
            shutil.copyfile(tokenizer, self.path / "tokenizer.json")

    def check_is_ours(self, resume: str, identity: dict[str, Any]) -> None:
        """Refuse a folder that this run may not go on in, with nothing written.

        Args:
            resume: ``auto``, ``none`` or a checkpoint's path.
            identity: what the run is; a folder made by another is refused.

        Raises:
            ConfigError: the folder holds something else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"--run {self.path} is a file; choose another folder")
        manifest = self.read_manifest()
        if manifest is None:
            if any(path.name != LOCK and not _is_leftover(path) for path in self.path.iterdir()):
                raise ConfigError(
                    f"--run {self.path} holds something that is not a run; choose another folder"
                )
            return
        if resume == "none":
            raise ConfigError(
                f"--run {self.path} holds a run; choose another folder, or continue it (--resume auto)"
            )
        found = differences(ONCE_IMPLIED | manifest.get("identity", {}), identity)
        if found:
            raise ConfigError(f"--run {self.path} was made with {found}; choose another --run")


def _is_same_file(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _is_leftover(path: Path) -> bool:
    """Whether this is what remains of an atomic write that was cut off."""
    return re.fullmatch(r"\..*\.tmp-\d+", path.name) is not None


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
