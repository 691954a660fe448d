"""The machine that a benchmark runs on: what its memory and its matrix units can do, and its name."""

from __future__ import annotations

import platform
import statistics
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sinktrain import __version__
from sinktrain.evaluation.timing import device_name, times_ms
from sinktrain.progress import progress_bar

COPY_BYTES, NUM_COPIES = 2**30, 20
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
NUM_MATMULS = {"cpu": 5, "cuda": 20}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy inside the device."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with progress_bar(desc="copy bandwidth", total=NUM_COPIES) as bar:
        target.copy_(source)
        times = times_ms(lambda: target.copy_(source), NUM_COPIES, device, bar.update)
    return 2 * COPY_BYTES / statistics.median(times) * 1e3


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of ``MATMUL_SIZE`` rows, random numbers in them."""
    size, num_matmuls = MATMUL_SIZE[device.type], NUM_MATMULS[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    with progress_bar(desc="matrix product", total=num_matmuls) as bar:
        torch.mm(a, b, out=product)
        times = times_ms(lambda: torch.mm(a, b, out=product), num_matmuls, device, bar.update)
    return 2 * size**3 / statistics.median(times) * 1e3


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "sinktrain": __version__,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "python": platform.python_version(),
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
