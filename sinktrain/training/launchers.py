"""Under torchrun and srun every rank reads the same command line: a mistake in it is told once on a host."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sinktrain.errors import SinktrainError

PATIENCE_S = 30.0
"""How long a rank waits to be ended, which torchrun and srun do once another one has failed."""


@contextmanager
def told_once_a_host() -> Iterator[None]:
    """Let the first rank of a host tell what is wrong, and others only if they live on: then it is theirs.

    Lightning's own launcher needs none of it: it starts the other ranks when rank 0 has found all in order.
    """
    try:
        yield
    except (SinktrainError, OSError):
        if _rank_on_host():
            time.sleep(PATIENCE_S)
        raise


def _rank_on_host() -> int:
    """0 too for those that Lightning started, whose fellows need not have seen the same."""
    name = "LOCAL_RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_LOCALID"
    return int(os.environ.get(name, 0))
