"""The folder that a preparation writes: kept to one process, how far it has come, continued or refused."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sinktrain.data.segments import Plan
from sinktrain.data.shards import SPLITS, Manifest, Shard, SplitCounts, TokenSplit, read_manifest
from sinktrain.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from sinktrain.errors import ConfigError, DataError
from sinktrain.files import write_json

PROGRESS_FILE = ".progress.json"


@dataclass
class Progress:
    """How far a preparation has come, as ``.progress.json`` keeps it."""

    request: dict[str, Any]
    plan: Plan
    document: int = 0  # the next segment: its document
    part: int = 0  # and its number within that
    counts: dict[str, SplitCounts] = field(default_factory=lambda: {split: SplitCounts() for split in SPLITS})
    shards: list[Shard] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())

    @property
    def text_bytes(self) -> int:
        return sum(counts.text_bytes for counts in self.counts.values())

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Raise ConfigError if the file is not one of ours."""
        try:
            content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            content["plan"] = Plan(**content["plan"])
            content["counts"] = {split: SplitCounts(**content["counts"][split]) for split in SPLITS}
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError):
            raise ConfigError(
                f"--out {folder}: its {PROGRESS_FILE} cannot be read; choose another --out"
            ) from None

    def save(self, folder: Path) -> None:
        write_json(folder / PROGRESS_FILE, asdict(self))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder; one that was made here and stays empty is taken away.

    Raises:
        ConfigError: no folder can be here, or another process holds it.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--out {folder}: not a folder that can be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {folder}: another sinktrain prepare is writing there") from None
        yield
    finally:
        os.close(handle)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def finished(folder: Path, request: dict[str, Any]) -> Manifest:
    """Return the manifest of a folder that has one.

    Raises:
        ConfigError: it was made by another request, or by something else.
        DataError: a shard is missing or has another size.
    """
    try:
        manifest = read_manifest(folder)
    except DataError:
        raise ConfigError(
            f"--out {folder}: holds the manifest.json of something else; choose another"
        ) from None
    _check_same(folder, request, manifest.request, "holds shards prepared")
    for split in SPLITS:
        TokenSplit.open(folder, split)
    forget_progress(folder)
    print(f"{folder}: already prepared", file=sys.stderr)
    return manifest


def resumed(folder: Path, request: dict[str, Any]) -> Progress | None:
    """Return how far this request has come in the folder; None for an empty folder.

    Raises:
        ConfigError: the folder holds another request's beginnings, or something else.
    """
    if not (folder / PROGRESS_FILE).exists():
        if all(_is_leftover(path) for path in folder.iterdir()):
            return None
        raise ConfigError(f"--out {folder}: holds something else; choose a new or empty folder")
    progress = Progress.read(folder)
    _check_same(folder, request, progress.request, "holds a half-finished preparation")
    if progress.num_tokens:
        print(f"{folder}: continuing after {progress.num_tokens:,} tokens", file=sys.stderr)
    return progress


def forget_progress(folder: Path) -> None:
    """Remove what only a preparation under way needs."""
    for path in folder.iterdir():
        if path.name == PROGRESS_FILE or _is_leftover(path):
            path.unlink()


def discard(folder: Path) -> None:
    """Remove all that a preparation wrote. Only for a folder that ``resumed`` did not refuse."""
    for path in folder.iterdir():
        is_shard = re.fullmatch(r"\.?tokens-.*\.bin(\.part)?", path.name)
        if is_shard or path.name in (TOKENIZER_FILE, CONFIG_FILE):
            path.unlink()
    forget_progress(folder)


def _check_same(folder: Path, request: dict[str, Any], other: dict[str, Any], holds: str) -> None:
    differing = [name for name in request if request[name] != other.get(name)]
    if differing:
        raise ConfigError(
            f"--out {folder}: {holds} with another {' and another '.join(differing)}; choose another --out"
        )


def _is_leftover(path: Path) -> bool:
    """Whether this is what remains of an atomic write that was cut off."""
    return re.fullmatch(r"\..*\.tmp-\d+", path.name) is not None
