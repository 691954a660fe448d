"""What launchers ask of a command: the devices that they started, mistakes told once, an end in order."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import distributed

from sinktrain.errors import ConfigError, SinktrainError

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


def torchrun_devices(devices: Any) -> dict[str, int]:
    """The Trainer's ``devices`` and ``num_nodes`` as torchrun started them; nothing elsewhere.

    Raises:
        ConfigError: ``devices`` asks for another number.
    """
    if not TorchElasticEnvironment.detect():
        return {}
    started = int(os.environ["LOCAL_WORLD_SIZE"])
    if str(devices) not in ("1", "-1", "auto", str(started)):
        raise ConfigError(
            f"--trainer.devices {devices}, but torchrun started {started} processes on this host; "
            "leave it out, or change --nproc-per-node"
        )
    return {"devices": started, "num_nodes": int(os.environ["WORLD_SIZE"]) // started}


def leave_group_at_exit() -> None:
    """End the process group in order: left to the interpreter, its threads abort or hang the process."""
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _rank_on_host() -> int:
    """0 too for those that Lightning started, whose fellows need not have seen the same."""
    name = "LOCAL_RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_LOCALID"
    return int(os.environ.get(name, 0))
