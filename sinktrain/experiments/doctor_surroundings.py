"""What a run meets outside Python: disk, limits, variables, launchers, accounts, the clock."""

from __future__ import annotations

import netrc
import os
import resource
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import sinktrain
from sinktrain.errors import SinktrainError, first_line
from sinktrain.experiments.doctor_finding import GIB, Finding
from sinktrain.experiments.doctor_packages import installed_version

ENOUGH_DISK_BYTES = 10 * GIB
ENOUGH_SHARED_BYTES = GIB
ENOUGH_FILES = 1024

SETTINGS = ("NCCL_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "CUDA_", "TRITON_", "GLOO_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")

SLOW: dict[str, tuple[str, str]] = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for"),
    "NCCL_P2P_DISABLE": ("1", "GPUs exchange gradients through the host"),
    "NCCL_SHM_DISABLE": ("1", "processes of a host exchange gradients through sockets"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every exchange of gradients is checked"),
    "TORCHDYNAMO_DISABLE": ("1", "nothing is compiled"),
    "TORCH_COMPILE_DISABLE": ("1", "nothing is compiled"),
    "TRITON_INTERPRET": ("1", "kernels are interpreted, not compiled"),
}
"""Variables that make training slow when they have this value, and how."""


def check_machine(environ: Mapping[str, str]) -> list[Finding]:
    """Disk, shared memory, open files, threads and the clock."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = Path("/dev/shm")
    return [
        judge_disk(shutil.disk_usage(Path.cwd()).free),
        *([judge_shared_memory(shutil.disk_usage(shared).total)] if shared.is_dir() else []),
        judge_open_files(files),
        judge_threads(environ.get("OMP_NUM_THREADS"), num_cores()),
        judge_clock(time.time(), Path(sinktrain.__file__).stat().st_mtime),
    ]


def judge_disk(free_bytes: int) -> Finding:
    found = f"{free_bytes / GIB:.1f} GiB free in the current folder"
    if free_bytes >= ENOUGH_DISK_BYTES:
        return Finding("disk", "ok", found)
    remedy = "free some, or pass --run on another disk; sinktrain fit … --dry_run says what a run needs"
    return Finding("disk", "warn", found, remedy)


def judge_shared_memory(total_bytes: int) -> Finding:
    found = f"{total_bytes / GIB:.2f} GiB"
    if total_bytes >= ENOUGH_SHARED_BYTES:
        return Finding("/dev/shm", "ok", found)
    return Finding("/dev/shm", "warn", f"{found}, little for NCCL", "docker run --shm-size 8g, or --ipc=host")


def judge_open_files(limit: int) -> Finding:
    """The soft limit of open files."""
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    if limit >= ENOUGH_FILES:
        return Finding("open files", "ok", f"up to {limit}")
    return Finding("open files", "warn", f"up to {limit}", f"ulimit -n {64 * ENOUGH_FILES}")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def judge_threads(threads: str | None, cores: int) -> Finding:
    """``OMP_NUM_THREADS`` (None where it is not set) against the cores."""
    if threads is None:
        return Finding("threads", "ok", f"OMP_NUM_THREADS is not set; {cores} cores")
    found = f"OMP_NUM_THREADS={threads}, {cores} cores"
    if threads.isdecimal() and 1 <= int(threads) <= cores:
        return Finding("threads", "ok", found)
    return Finding("threads", "warn", found, f"export OMP_NUM_THREADS={cores}, or less")


def judge_clock(now: float, installed_at: float) -> Finding:
    """The clock against the time, in seconds since 1970, at which sinktrain was installed."""
    found = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC"
    if now >= installed_at - 86_400:
        return Finding("clock", "ok", found)
    return Finding(
        "clock", "bad", f"{found}, before sinktrain was installed", "set it: timedatectl set-ntp true"
    )


# -- variables ------------------------------------------------------------------------------------


def check_variables(environ: Mapping[str, str]) -> list[Finding]:
    """Variables that change what torch, NCCL and Triton do; a secret's value is not told."""
    findings = []
    for name in sorted(environ):
        if name.startswith(SETTINGS):
            is_secret = any(word in name for word in SECRETS)
            findings.append(_variable(name, "(not shown)" if is_secret else environ[name]))
    return findings


def _variable(name: str, value: str) -> Finding:
    slow_value, effect = SLOW.get(name, ("", ""))
    if effect and value.upper() == slow_value:
        return Finding(name, "warn", f"{value}: {effect}", f"unset {name}")
    return Finding(name, "ok", value or '""')


def check_launcher(environ: Mapping[str, str]) -> list[Finding]:
    """SLURM and torchrun, which decide together with ``trainer.devices`` how many processes there are."""
    if "TORCHELASTIC_RUN_ID" in environ:
        here = environ.get("LOCAL_WORLD_SIZE", "?")
        found = f"torchrun, {environ.get('WORLD_SIZE', '?')} processes, {here} of them on this host"
        return [Finding("launcher", "ok", f"{found}: fit needs --trainer.devices {here}")]
    if "SLURM_NTASKS" in environ:
        return [_slurm(environ)]
    left_over = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK") if name in environ]
    if left_over:
        found = f"{', '.join(left_over)} set, but not by torchrun: fit may wait for processes that never come"
        return [Finding("launcher", "warn", found, f"unset {' '.join(left_over)}")]
    return [Finding("launcher", "ok", "none: fit starts one process for each of trainer.devices")]


def _slurm(environ: Mapping[str, str]) -> Finding:
    tasks, nodes = environ["SLURM_NTASKS"], environ.get("SLURM_NNODES", "1")
    found = f"SLURM, {tasks} tasks on {nodes} nodes"
    if environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return Finding("launcher", "ok", f"{found}, interactive: fit starts its processes itself")
    if "SLURM_PROCID" not in environ and tasks != "1":
        return Finding(
            "launcher", "warn", f"{found}, not started by srun", "start fit by srun in the job's script"
        )
    per_node = environ.get("SLURM_NTASKS_PER_NODE")
    if per_node is None and tasks != "1":
        remedy = "say --ntasks-per-node, the same as --trainer.devices"
        return Finding("launcher", "warn", f"{found}, without tasks per node", remedy)
    wanted = f"--trainer.devices {per_node or 1} and --trainer.num_nodes {nodes}"
    return Finding("launcher", "ok", f"{found}: fit needs {wanted}")


# -- accounts -------------------------------------------------------------------------------------


def check_hub(environ: Mapping[str, str], is_online: bool) -> list[Finding]:
    """Login to the Hugging Face Hub; the network is asked only if ``is_online``."""
    from huggingface_hub import get_token

    place = urlsplit(environ.get("HF_ENDPOINT", "")).hostname or "huggingface.co"
    if environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        found = "HF_HUB_OFFLINE is set: only what is in the cache is found"
        return [Finding("Hub", "warn", found, "unset HF_HUB_OFFLINE to download")]
    if get_token() is None:
        found = f"no token for {place}: public models and datasets only"
        return [Finding("Hub", "warn", found, "hf auth login")]
    return [_online_hub(place) if is_online else Finding("Hub", "ok", f"a token for {place}")]


def _online_hub(place: str) -> Finding:
    from huggingface_hub import HfApi

    try:
        return Finding("Hub", "ok", f"logged in at {place} as {HfApi().whoami()['name']}")
    except Exception as error:  # its HTTP library's errors come through
        found = f"{place} does not take the token: {first_line(error)}"
        return Finding("Hub", "warn", found, "hf auth login, or mend the network")


def check_wandb(environ: Mapping[str, str]) -> list[Finding]:
    """Login to Weights & Biases: a key in the environment or in .netrc."""
    if installed_version("wandb") is None:
        return []
    mode = environ.get("WANDB_MODE", "online")
    host = urlsplit(environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    if mode != "online":
        return [Finding("wandb login", "ok", f"not needed: WANDB_MODE={mode}")]
    if "WANDB_API_KEY" in environ or has_netrc_entry(host, environ):
        return [Finding("wandb login", "ok", f"a key for {host}")]
    remedy = "wandb login, or WANDB_MODE=offline"
    return [Finding("wandb login", "warn", f"no key for {host}: --config wandb would stop and ask", remedy)]


def has_netrc_entry(host: str, environ: Mapping[str, str]) -> bool:
    path = Path(environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# -- data -----------------------------------------------------------------------------------------


def check_shards(folder: Path) -> list[Finding]:
    """Prepared shards: manifest, sizes of the files, tokens of each split."""
    from sinktrain.data.shards import SPLITS, TokenSplit

    try:
        tokens = [f"{TokenSplit.open(folder, split).num_tokens:,} tokens in {split}" for split in SPLITS]
    except SinktrainError as error:
        return [Finding("shards", "bad", str(error), "sinktrain prepare TEXT --out DIR")]
    return [Finding("shards", "ok", f"{folder}: {', '.join(tokens)}")]
