"""The clock and the memory of a device: how long calls take, and how much is held meanwhile."""

from __future__ import annotations

import contextlib
import gc
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from sinktrain.errors import ConfigError


def check_timed(device: torch.device) -> None:
    """Raise ConfigError for a device whose clock is not known here."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: only cpu and cuda are timed; use one of them")


def times_ms(
    act: Callable[[], object],
    num_times: int,
    device: torch.device,
    after_each: Callable[[], object] = lambda: None,
) -> list[float]:
    """Milliseconds of each call. On CUDA the host runs ahead: it waits for the device at the end alone."""
    if device.type != "cuda":
        times = []
        for _ in range(num_times):
            started_at = time.perf_counter()
            act()
            times.append((time.perf_counter() - started_at) * 1e3)
            after_each()
        return times

    new_event: Callable[[], torch.cuda.Event] = partial(torch.cuda.Event, enable_timing=True)
    events = [new_event() for _ in range(num_times + 1)]
    events[0].record()
    for event in events[1:]:
        act()
        event.record()
        after_each()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where it cannot be reset it counts from the process's start
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory held since ``reset_peak``: allocated on CUDA, the whole process's resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident_bytes("VmHWM")


def held_bytes(device: torch.device) -> int:
    """Memory held now, counted as ``peak_bytes`` does."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _resident_bytes("VmRSS")


def free_bytes(device: torch.device) -> int:
    """Memory that is left; on the CPU only Linux tells, elsewhere it never ends."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was released here is free, but the driver does not know it
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        available = None
    return 1024 * int(available[1]) if available else sys.maxsize


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Such as ``cuda (NVIDIA H100 80GB HBM3)``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return f"{device.type} ({name})"


def _resident_bytes(field_name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field_name}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
