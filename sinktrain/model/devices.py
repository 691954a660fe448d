"""What a device computes in, and whether it has faster ways than plain torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def has_fast_path(x: Tensor) -> bool:
    """Whether Triton's kernels take this tensor: on CUDA, in anything but float64."""
    return HAS_TRITON and x.device.type == "cuda" and x.dtype != torch.float64


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, as configs write it."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with ``x`` are computed in: autocast's precision where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a @ b`` to a float32 total, in place, without rounding it to the dtype of ``a`` and ``b``."""
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if a.device.type == "cuda":
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())  # torch 2.13 has out_dtype for CUDA alone


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, whatever the dtype of ``a`` and ``b``."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
