"""What ``sinktrain doctor`` says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mark = Literal["ok", "warn", "bad"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Args:
        subject: what was looked at.
        mark: ``bad`` stops or spoils a run, ``warn`` may slow or surprise one.
        found: what it is.
        remedy: what to type or change; empty where all is well.
    """

    subject: str
    mark: Mark
    found: str
    remedy: str = ""
