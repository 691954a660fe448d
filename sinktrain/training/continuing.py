"""What a run continues from: the newest of its checkpoints that is whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sinktrain.errors import ModelError
from sinktrain.training.checkpoint_file import check_whole
from sinktrain.training.saving import LAST, name_last


@dataclass(frozen=True)
class Continuation:
    """What ``--resume auto`` found in a folder of checkpoints.

    Args:
        checkpoint: the newest whole one, as ``last.ckpt`` where that names it; None where there is none.
        passed_over: newer ones, and what is wrong with each.
    """

    checkpoint: Path | None
    passed_over: dict[Path, str]


def newest_whole(folder: Path) -> Continuation:
    """Find the newest whole checkpoint, from the one that ``last.ckpt`` names backwards.

    Every rank finds the same, also while rank 0 sets damaged ones aside.
    """
    passed_over: dict[Path, str] = {}
    for candidate in _candidates(folder):
        try:
            check_whole(candidate)
            return Continuation(candidate, passed_over)
        except ModelError as error:
            passed_over[candidate] = _what_is_gone(candidate) or str(error)
    return Continuation(None, passed_over)


def set_aside(found: Continuation) -> None:
    """Let ``last.ckpt`` name the whole one, and rename the damaged ones, which would count as kept."""
    assert found.checkpoint is not None
    damaged = [path.resolve() for path in found.passed_over]
    name_last(found.checkpoint.resolve())
    for path in damaged:
        if path.exists():
            os.replace(path, path.with_name(f"{path.name}.damaged"))


def leave_behind(folder: Path, start: Path) -> None:
    """Rename to ``….left`` what a run that goes back to ``start`` leaves behind: none falls back on it."""
    is_ours = start.resolve().parent == folder.resolve()
    if is_ours:
        name_last(start.resolve())
    else:
        (folder / LAST).unlink(missing_ok=True)
    for path in folder.glob("step-*.ckpt"):
        if not is_ours or _step(path) > _step(start.resolve()):
            os.replace(path, path.with_name(f"{path.name}.left"))


def _what_is_gone(link: Path) -> str:
    return f"{link} names {link.readlink()}, which is gone" if link.is_symlink() and not link.exists() else ""


def _candidates(folder: Path) -> list[Path]:
    """``last.ckpt``, and checkpoints of steps before its own, newest first; of all steps, without one."""
    last = folder / LAST
    steps = sorted(folder.glob("step-*.ckpt"), key=_step, reverse=True)
    if not last.is_symlink():
        return [last, *steps] if last.exists() else steps
    newest = _step(last.readlink())
    return [last, *(path for path in steps if _step(path) < newest)]


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1
