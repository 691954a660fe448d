"""The devices: what they are, who else uses them, and whether they compute what they should.

Axes: batch, head, seq, head_dim, hidden, vocab.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.data.windows import IGNORED
from sinktrain.errors import first_line
from sinktrain.evaluation.timing import device_name
from sinktrain.experiments.doctor_finding import GIB, Finding, Mark
from sinktrain.model.devices import dtype_name, has_fast_path
from sinktrain.model.loss import summed_loss, token_losses
from sinktrain.training.checks import lacks_bfloat16
from sinktrain.training.throughput import peak_flops

OTHERS_BYTES = GIB
"""Memory of other processes from which on a GPU counts as shared."""

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest error, as a share of the largest value, that rounding may make in the products tried here."""


@dataclass(frozen=True)
class DriverGPU:
    """A GPU as the driver tells of it, before this process uses it."""

    uuid: str
    name: str
    used_bytes: int
    driver: str


def check_devices() -> list[Finding]:
    """The CPU, or every GPU that this process sees; each computes something small."""
    told = gpus_of_driver()  # first: this process will use memory itself
    findings = [judge_build(told, torch.version.cuda, torch.cuda.is_available(), _visible())]
    if not torch.cuda.is_available():
        cpu = torch.device("cpu")
        return [*findings, Finding("CPU", "ok", device_name(cpu)), *try_device(cpu)]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        findings += [_gpu(device, told), *try_device(device)]
    return findings + _together(devices)


def gpus_of_driver() -> list[DriverGPU]:
    """Every GPU that nvidia-smi knows; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = [
        "nvidia-smi",
        "--query-gpu=uuid,memory.used,driver_version,name",
        "--format=csv,noheader,nounits",
    ]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [gpu_of_line(line) for line in told.splitlines() if line.count(",") >= 3]


def gpu_of_line(line: str) -> DriverGPU:
    """``GPU-…, 4, 570.86, NVIDIA H100``; memory in MiB, or ``[N/A]``."""
    uuid, used, driver, name = (cell.strip() for cell in line.split(",", 3))
    return DriverGPU(uuid, name, 2**20 * int(used) if used.isdecimal() else 0, driver)


def judge_build(
    told: list[DriverGPU], cuda_build: str | None, is_usable: bool, visible: str | None
) -> Finding:
    """Whether torch can use the GPUs that the driver has.

    Args:
        told: GPUs of the driver.
        cuda_build: version of CUDA that torch was built for; None for the CPU alone.
        is_usable: whether torch finds a GPU.
        visible: ``CUDA_VISIBLE_DEVICES``; None where it is not set.
    """
    build = "the CPU" if cuda_build is None else f"CUDA {cuda_build}"
    if not told:
        driver = "" if is_usable else ", no NVIDIA driver"
        return Finding("CUDA", "ok", f"torch is built for {build}{driver}")
    driver = f"driver {told[0].driver}"
    if is_usable:
        return Finding("CUDA", "ok", f"torch is built for {build}, {driver}")
    if visible is not None:
        found = f'CUDA_VISIBLE_DEVICES="{visible}" hides all of {len(told)} GPUs'
        return Finding("CUDA", "warn", found, "unset CUDA_VISIBLE_DEVICES, or name GPUs that there are")
    if cuda_build is None:
        remedy = "pip install torch from an index with CUDA builds (pytorch.org/get-started)"
        return Finding("CUDA", "bad", f"{len(told)} GPUs, but torch is built for the CPU alone", remedy)
    remedy = f"update the driver, or install a torch built for an older CUDA than {cuda_build}"
    return Finding(
        "CUDA", "bad", f"{len(told)} GPUs that torch cannot use: built for {build}, {driver}", remedy
    )


def _visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _gpu(device: torch.device, told: list[DriverGPU]) -> Finding:
    properties = torch.cuda.get_device_properties(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    used = {gpu.uuid.removeprefix("GPU-"): gpu.used_bytes for gpu in told}
    others_bytes = used.get(str(properties.uuid), 0)
    facts = [
        properties.name,
        f"{free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free",
        f"compute capability {properties.major}.{properties.minor}",
    ]
    problems = []
    if others_bytes > OTHERS_BYTES:
        problems.append((f"{others_bytes / GIB:.1f} GiB used by others", "nvidia-smi shows by whom"))
    if lacks_bfloat16(device):
        problems.append(("no bfloat16", "train with --trainer.precision 32-true"))
    peak = peak_flops(device)
    if peak is None:
        problems.append(("peak unknown: no MFU is logged", "compare tokens/s instead"))
    else:
        facts.append(f"{peak / 1e12:.0f} TFLOP/s in bf16")
    mark: Mark = "warn" if problems else "ok"
    facts += [problem for problem, _ in problems]
    return Finding(str(device), mark, ", ".join(facts), "; ".join(remedy for _, remedy in problems))


def try_device(device: torch.device) -> list[Finding]:
    """Compute on the device what is known from float64 on the CPU."""
    trials = {"matrix product": try_product, "attention": try_attention}
    if has_fast_path(torch.empty(0, device=device)):
        trials["Triton kernel"] = try_kernel
    findings = []
    for name, trial in trials.items():
        subject = f"{device} {name}"
        try:
            dtype, error = trial(device)
            findings.append(judge_error(subject, dtype, error))
        except Exception as problem:  # a device that is broken fails in ways of its own
            remedy = "see whether another device or torch version does it"
            findings.append(Finding(subject, "bad", f"fails: {first_line(problem)}", remedy))
    return findings


def judge_error(subject: str, dtype: torch.dtype, error: float) -> Finding:
    """A result's largest error, as a share of its largest value; not a number counts as too large."""
    name = dtype_name(dtype)
    if error <= TOLERANCE[dtype]:
        return Finding(subject, "ok", f"{name}, off by {error:.0e}")
    remedy = "do not train on it: its driver, memory or torch build computes wrongly"
    return Finding(subject, "bad", f"{name}, off by {error:.0e}, where {TOLERANCE[dtype]:.0e} may be", remedy)


def try_product(device: torch.device) -> tuple[torch.dtype, float]:
    """A product of two matrices against float64: its dtype, and its error as ``judge_error`` takes it."""
    dtype = _working_dtype(device)
    a, b = (_random(256, 256).to(dtype) for _ in range(2))
    product = a.to(device) @ b.to(device)
    return dtype, _error(product, a.double() @ b.double())


def try_attention(device: torch.device) -> tuple[torch.dtype, float]:
    """Causal attention and its gradients against float64."""
    dtype = _working_dtype(device)
    inputs = [_random(1, 2, 128, 64).to(dtype) for _ in range(3)]  # [batch, head, seq, head_dim]
    found = _attention_and_gradients([x.to(device) for x in inputs])
    expected = _attention_and_gradients([x.double() for x in inputs])
    return dtype, max(_error(a, b) for a, b in zip(found, expected, strict=True))


def try_kernel(device: torch.device) -> tuple[torch.dtype, float]:
    """The loss without logits, a Triton kernel, against its plain twin in float64."""
    dtype = _working_dtype(device)
    hidden, head = _random(1, 64, 128).to(dtype), _random(512, 128).to(dtype)
    targets = torch.arange(64)[None] * 7
    targets[0, 5] = IGNORED
    with torch.no_grad():
        found = summed_loss(hidden.to(device), head.to(device), targets.to(device))
        expected = token_losses(hidden.double() @ head.double().t(), targets).sum()
    return dtype, _error(found, expected)


def _working_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cuda" and lacks_bfloat16(device) else torch.bfloat16


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    normal: Tensor = torch.randn(*shape, generator=generator)
    return normal / math.sqrt(shape[-1])


def _attention_and_gradients(inputs: list[Tensor]) -> list[Tensor]:
    q, k, v = leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())


def _together(devices: list[torch.device]) -> list[Finding]:
    """What several GPUs need of each other."""
    if len(devices) < 2:
        return []
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    apart = [
        f"{a.index}-{b.index}"
        for a, b in itertools.combinations(devices, 2)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    peers = Finding("peer access", "ok", f"between all {len(devices)} GPUs")
    if apart:
        found = f"none between GPUs {', '.join(apart)}: gradients travel through the host's memory"
        peers = Finding("peer access", "warn", found, "nvidia-smi topo -m shows the links")
    return [Finding("NCCL", "ok", nccl), peers]
