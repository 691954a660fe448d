"""Progress on stderr: a live bar on a terminal, and a plain line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 10.0
COLUMNS, ROWS = 79, 24
"""Of a terminal that does not know its size, as those of job runners: tqdm would show nothing there."""


def progress_bar(**options: Any) -> tqdm[Any]:
    """A tqdm bar with the project's habits; takes tqdm's own options (total, desc, unit, …)."""
    if not sys.stderr.isatty():
        return tqdm(file=_LOG, mininterval=1.0, ncols=0, leave=False, **options)  # 0: numbers without a bar
    size = {"dynamic_ncols": True} if _knows_its_size() else {"ncols": COLUMNS, "nrows": ROWS}
    return tqdm(file=sys.stderr, mininterval=0.2, leave=False, **size, **options)


def _knows_its_size() -> bool:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False


class LogLines:
    """What bars draw over each other becomes lines, far enough apart; to tqdm it is a file.

    The time counts over all bars, so that many short ones are told of too.
    """

    def __init__(self) -> None:
        self.told_at = time.monotonic()

    def write(self, drawn: str) -> None:
        line = drawn.strip()
        if line and time.monotonic() - self.told_at >= LOG_INTERVAL_S:
            print(line, file=sys.stderr, flush=True)
            self.told_at = time.monotonic()

    def flush(self) -> None:
        """Each line is flushed as it is written."""


_LOG = LogLines()
