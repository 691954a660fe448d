"""Progress bars on stderr: live on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 10.0


def progress_bar(**options: Any) -> tqdm[Any]:
    """A tqdm bar with the project's habits; takes tqdm's own options (total, desc, unit, …)."""
    interval_s = 0.2 if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(file=sys.stderr, mininterval=interval_s, dynamic_ncols=True, leave=False, **options)
