"""What a device must be able to do before anything is built on it."""

from __future__ import annotations

from typing import Any

import torch

from sinktrain.errors import ConfigError

BFLOAT16_SINCE = (8, 0)
"""Compute capability from which NVIDIA's matrix units take bfloat16: Ampere."""


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is emulated on this device, if it is there at all."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) < BFLOAT16_SINCE


def check_device(device: torch.device) -> None:
    """Refuse a device whose optimizer neither clips nor skips.

    Raises:
        ConfigError: neither a CPU nor CUDA, such as Apple's MPS.
    """
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"trainer.accelerator: training on {device.type} is not supported; use --trainer.accelerator cpu"
        )


def check_precision(precision: Any, device: torch.device) -> None:
    """Refuse a precision that the device does not compute in.

    Args:
        precision: ``trainer.precision`` as Lightning resolved it.

    Raises:
        ConfigError: bfloat16 on a GPU older than Ampere.
    """
    if "bf16" in str(precision) and lacks_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"trainer.precision {precision}: the device ({name}) has no bfloat16; use 32-true, or a GPU from "
            "Ampere (compute capability 8.0) on"
        )
