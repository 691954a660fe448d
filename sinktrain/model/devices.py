"""What a device computes in, and whether it has faster ways than plain torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def has_fast_path(x: Tensor) -> bool:
    """Whether Triton's kernels take this tensor: on CUDA, in anything but float64."""
    return HAS_TRITON and x.device.type == "cuda" and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with ``x`` are computed in: autocast's precision where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
