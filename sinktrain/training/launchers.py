"""What launchers ask of a command: their devices, one voice and one finding of all ranks, an end in order."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy
from torch import distributed
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from sinktrain.errors import ConfigError, SinktrainError

Found = TypeVar("Found")

USER_MISTAKE = 2
"""Exit code of a ``SinktrainError``."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

FOUND = "SINKTRAIN_FOUND"
"""The environment variable by which a process hands what it found to those that Lightning has it start."""

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


def find_once(trainer: pl.Trainer, find: Callable[[], Found]) -> Found:
    """What ``find`` gives on rank 0, on every rank; what it raises there, all raise. Every rank must ask.

    For work that all would do alike, before there is a process group. Where Lightning starts the other
    ranks, it is done once a host, by the process that starts them.

    Args:
        find: its value, or its error, must be one that ``pickle`` takes.
    """
    if trainer.world_size == 1:
        return find()
    environment: Any = cast(Any, trainer.strategy).cluster_environment
    if isinstance(environment, LightningEnvironment) and environment.local_rank() and FOUND in os.environ:
        return cast(Found, _unpacked(os.environ[FOUND]))
    if environment.creates_processes_externally:
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        return _find_on_rank_zero(_store(trainer.global_rank, trainer.world_size), trainer.global_rank, find)
    value = find()
    os.environ[FOUND] = _packed(value)
    return value


def _find_on_rank_zero(store: Store, rank: int, find: Callable[[], Found]) -> Found:
    key = f"sinktrain/found/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank != 0:
        is_good, found = _unpacked(store.get(key).decode())
        if not is_good:
            raise found
        return cast(Found, found)
    try:
        value = find()
    except Exception as error:
        store.set(key, _packed((False, error)))
        raise
    store.set(key, _packed((True, value)))
    return value


def _packed(value: Any) -> str:
    return pickle.dumps(value).hex()


def _unpacked(text: str) -> Any:
    return pickle.loads(bytes.fromhex(text))


@cache
def _store(rank: int, world_size: int) -> Store:
    """Where all ranks meet, kept: the process group will meet there too, on rank 0's server."""
    store: Store = next(rendezvous("env://", rank, world_size))[0]
    return store


def leave_together(trainer: pl.Trainer, exit_code: int, error: BaseException | None) -> NoReturn:
    """Raise the error on rank 0, which tells it, and end the others with its exit code. All must ask for it.

    They wait for each other when all is done: torchrun and srun end what still runs once a rank has left
    with such a code, and rank 0 may not have told yet.
    """
    if trainer.world_size > 1:
        atexit.register(_meet, trainer.strategy)
    if trainer.is_global_zero:
        assert error is not None
        raise error
    raise SystemExit(exit_code)


def _meet(strategy: Strategy) -> None:
    """Wait for the other ranks; from then on no signal changes the exit code of this one."""
    with suppress(RuntimeError):  # one of them has died
        strategy.barrier()
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


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
