"""Where the time of a training step goes: kernels (CUDA) or operations (CPU) by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

PARTS: tuple[tuple[str, str], ...] = (
    ("matrix products", r"^triton_tem_.*mm"),
    ("loss", r"softmax|nll_loss|cross_entropy|linear_loss"),
    ("norms, activations, pointwise", r"^triton_"),  # Inductor names a kernel after its neighbours too
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"sdpa|flash|fmha|scaled_?dot_?product|attention"),
    ("rotation", r"rotate"),
    ("optimizer", r"multi_tensor|adam|_foreach|lpnorm"),
    ("matrix products", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitk|aten::(add|bad)?d?b?mm\b|aten::linear"),
    ("norms, activations, pointwise", r"elementwise|reduce|layer_?norm|gelu|index|aten::"),
)
"""What a kernel is for, by the first pattern that its name matches."""
OTHER = "other"
PART_NAMES = (*dict.fromkeys(part for part, _ in PARTS), OTHER)


def part_of(name: str) -> str:
    """The part that a kernel or operation of this name belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def time_by_part(
    run_steps: Callable[[int], object], num_steps: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds that a step spends in each part.

    On CUDA the sum over its kernels, which is less than the step's time where the device idles and may be
    more where kernels overlap; on the CPU the operations' own times.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        run_steps(num_steps)
        if on_cuda:
            torch.cuda.synchronize()
    parts = dict.fromkeys(PART_NAMES, 0.0)
    for name, microseconds in _times(profiler, on_cuda):
        parts[part_of(name)] += microseconds / 1e3 / num_steps
    return parts


def _times(profiler: profile, on_cuda: bool) -> Iterator[tuple[str, float]]:
    """Names and microseconds of what ran on the device itself."""
    for event in profiler.key_averages():
        if (event.device_type.name == "CUDA") == on_cuda and not event.is_user_annotation:
            yield event.key, event.self_device_time_total if on_cuda else event.self_cpu_time_total
