"""The machine that a benchmark runs on: its clock, its memory, its bandwidth, its name."""

from __future__ import annotations

import contextlib
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sinktrain import __version__
from sinktrain.progress import progress_bar

COPY_BYTES, NUM_COPIES = 2**30, 20


def times_ms(
    act: Callable[[], object], num_times: int, device: torch.device, after_each: Callable[[], object]
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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy inside the device."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with progress_bar(desc="copy bandwidth", total=NUM_COPIES) as bar:
        target.copy_(source)
        times = times_ms(lambda: target.copy_(source), NUM_COPIES, device, bar.update)
    return 2 * COPY_BYTES / statistics.median(times) * 1e3


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


def _resident_bytes(field_name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field_name}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "sinktrain": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "num_threads": torch.get_num_threads(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
