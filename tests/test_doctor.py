"""The doctor: what it calls bad, what it says to type, and what it never tells."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sinktrain.cli import main
from sinktrain.cli.doctor import lines
from sinktrain.experiments.doctor import examine, looked_at
from sinktrain.experiments.doctor_devices import (
    DriverGPU,
    check_devices,
    gpu_of_line,
    judge_build,
    judge_error,
    try_device,
)
from sinktrain.experiments.doctor_finding import GIB, Finding
from sinktrain.experiments.doctor_packages import judge_package, judge_python
from sinktrain.experiments.doctor_surroundings import (
    check_hub,
    check_launcher,
    check_variables,
    has_netrc_entry,
    judge_clock,
    judge_disk,
    judge_open_files,
    judge_shared_memory,
    judge_threads,
)

LIGHTNING = Requirement("lightning>=2.6.6,<2.7")


# -- the command ----------------------------------------------------------------------------------


def test_this_machine_can_train_and_nothing_leaves_it(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    assert main(["doctor", "--data.path", str(shards)]) == 0
    told = capsys.readouterr().out.splitlines()
    subjects = {line[6:].partition("  ")[0] for line in told if line.startswith(("ok ", "warn "))}
    packages = {"torch", "lightning", "transformers", "tokenizers", "datasets", "jsonargparse", "deepspeed"}
    assert packages | {"Python", "Triton", "C compiler", "CUDA", "disk", "open files", "threads"} <= subjects
    assert {"clock", "launcher", "Hub", "shards"} <= subjects
    assert all(" -> " in line for line in told if line.startswith("warn"))
    assert told[-1].endswith(" 0 bad")


def test_something_bad_is_told_with_its_remedy_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", "--data.path", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    told = json.loads(out)
    assert out == json.dumps(told, indent=2) + "\n"
    bad = [finding for finding in told["findings"] if finding["mark"] == "bad"]
    assert [finding["subject"] for finding in bad] == ["shards"]
    assert "no prepared shards here" in bad[0]["found"]
    assert bad[0]["remedy"] == "sinktrain prepare TEXT --out DIR"
    assert told["num_bad"] == 1
    assert told["num_warn"] == sum(finding["mark"] == "warn" for finding in told["findings"])


def test_what_to_type_stays_whole_where_a_line_does_not_fit() -> None:
    findings = [
        Finding("disk", "ok", "72.7 GiB free"),
        Finding("Hub", "warn", "no token: public models only", "hf auth login"),
    ]
    disk, hub = "ok    disk  72.7 GiB free", "warn  Hub   no token: public models only"
    for columns in (None, 80, len(hub) + 17):
        assert lines(findings, columns) == [disk, f"{hub} -> hf auth login"]
    assert lines(findings, len(hub) + 16) == [disk, hub, "            -> hf auth login"]


def test_a_part_that_cannot_look_does_not_hide_the_others() -> None:
    def look() -> list[Finding]:
        raise ImportError("libcudart.so.13: cannot open shared object file\nlong story")

    [finding] = looked_at("devices", look)
    assert finding.mark == "bad"
    assert finding.found == "could not be examined: libcudart.so.13: cannot open shared object file"


# -- packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "mark", "found"),
    [
        ("2.6.6", "ok", "2.6.6 (>=2.6.6,<2.7)"),
        ("2.6.2", "bad", "2.6.2 is a compromised release (GHSA-w37p-236h-pfx3)"),
        ("2.6.3", "bad", "2.6.3 is a compromised release (GHSA-w37p-236h-pfx3)"),
        ("2.6.5", "bad", "2.6.5, but sinktrain works with >=2.6.6,<2.7"),
        ("2.7.0", "bad", "2.7.0, but sinktrain works with >=2.6.6,<2.7"),
        (None, "bad", "not installed"),
    ],
)
def test_lightning_must_be_the_pinned_one(version: str | None, mark: str, found: str) -> None:
    finding = judge_package(LIGHTNING, version)
    assert (finding.mark, finding.found) == (mark, found)
    assert finding.remedy.startswith("pip install 'lightning>=2.6.6,<2.7'" if mark == "bad" else "")
    assert ("replace the keys" in finding.remedy) == ("compromised" in found)


def test_a_build_of_torch_within_the_range_is_good() -> None:
    assert judge_package(Requirement("torch>=2.11"), "2.13.0+cpu").mark == "ok"
    assert judge_package(Requirement("torch>=2.11"), "2.12.0.dev20260301+cu130").mark == "ok"


def test_an_old_python_is_bad() -> None:
    assert judge_python("3.12.1", SpecifierSet(">=3.11")).mark == "ok"
    assert judge_python("3.10.4", SpecifierSet(">=3.11")).found == "3.10.4, but sinktrain needs >=3.11"


# -- devices --------------------------------------------------------------------------------------

H100 = DriverGPU("GPU-1", "NVIDIA H100", 0, "570.86.15")


def test_what_the_driver_says_of_a_gpu_is_read() -> None:
    line = "GPU-8a1b, 2048, 570.86.15, NVIDIA H100 80GB HBM3"
    assert gpu_of_line(line) == DriverGPU("GPU-8a1b", "NVIDIA H100 80GB HBM3", 2 * GIB, "570.86.15")
    assert gpu_of_line("GPU-1, [N/A], 570, NVIDIA GB10").used_bytes == 0


@pytest.mark.parametrize(
    ("told", "build", "is_usable", "visible", "mark", "found"),
    [
        ([], None, False, None, "ok", "torch is built for the CPU, no NVIDIA driver"),
        ([H100], "12.8", True, None, "ok", "torch is built for CUDA 12.8, driver 570.86.15"),
        ([H100], None, False, None, "bad", "1 GPUs, but torch is built for the CPU alone"),
        ([H100], "13.0", False, None, "bad", "1 GPUs that torch cannot use: built for CUDA 13.0, driver 570"),
        ([H100], "12.8", False, "", "warn", 'CUDA_VISIBLE_DEVICES="" hides all of 1 GPUs'),
    ],
)
def test_gpus_that_torch_cannot_use_are_found(
    told: list[DriverGPU], build: str | None, is_usable: bool, visible: str | None, mark: str, found: str
) -> None:
    finding = judge_build(told, build, is_usable, visible)
    assert finding.mark == mark
    assert finding.found.startswith(found)
    assert bool(finding.remedy) == (mark != "ok")


@pytest.mark.parametrize(("error", "mark"), [(1e-3, "ok"), (0.1, "bad"), (float("nan"), "bad")])
def test_a_device_that_computes_wrongly_is_bad(error: float, mark: str) -> None:
    assert judge_error("cuda:0", torch.bfloat16, error).mark == mark


def test_this_cpu_computes_as_float64_does() -> None:
    findings = try_device(torch.device("cpu"))
    assert [finding.subject for finding in findings] == ["cpu matrix product", "cpu attention"]
    assert {finding.mark for finding in findings} == {"ok"}


def test_a_device_that_fails_is_bad_and_does_not_end_the_examination() -> None:
    findings = try_device(torch.device("meta"))  # computes nothing
    assert [finding.mark for finding in findings] == ["bad", "bad"]
    assert all(finding.found.startswith("fails: ") for finding in findings)


@pytest.mark.gpu
def test_gpus_compute_as_float64_does() -> None:
    findings = check_devices()
    tried = [finding for finding in findings if finding.subject.startswith("cuda:0 ")]
    assert [f.subject for f in tried] == [
        "cuda:0 matrix product",
        "cuda:0 attention",
        "cuda:0 Triton kernel",
    ]
    assert {finding.mark for finding in tried} == {"ok"}


# -- surroundings ---------------------------------------------------------------------------------


def test_what_is_too_little_is_told() -> None:
    assert [judge_disk(size * GIB).mark for size in (9, 11)] == ["warn", "ok"]
    assert judge_shared_memory(64 * 2**20).remedy == "docker run --shm-size 8g, or --ipc=host"
    assert judge_shared_memory(8 * GIB).mark == "ok"
    assert judge_open_files(256).remedy == "ulimit -n 65536"
    assert judge_open_files(1024).mark == "ok"
    assert judge_open_files(-1).found == "no limit"
    assert judge_threads("64", 8).remedy == "export OMP_NUM_THREADS=8, or less"
    assert judge_threads("many", 8).mark == "warn"
    assert [judge_threads(threads, 8).mark for threads in (None, "1", "8")] == ["ok"] * 3
    assert judge_clock(0.0, 1.7e9).mark == "bad"
    assert judge_clock(1.8e9, 1.7e9).found == "2027-01-15 08:00 UTC"


def test_variables_that_slow_training_are_told() -> None:
    found = {
        finding.subject: finding
        for finding in check_variables({"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO", "PATH": "/bin"})
    }
    assert list(found) == ["NCCL_DEBUG", "NCCL_P2P_DISABLE"]
    assert found["NCCL_DEBUG"].mark == "ok"
    assert found["NCCL_P2P_DISABLE"].mark == "warn"
    assert found["NCCL_P2P_DISABLE"].remedy == "unset NCCL_P2P_DISABLE"


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "s3cret-a",
        "WANDB_API_KEY": "s3cret-b",
        "TORCH_HUB_TOKEN": "s3cret-c",
        "HF_ENDPOINT": "https://me:s3cret-d@hub.example",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    findings = examine(secrets)
    assert "s3cret" not in repr(findings)
    found = {finding.subject: finding.found for finding in findings}
    assert found["Hub"] == "a token for hub.example"
    assert found["TORCH_HUB_TOKEN"] == "(not shown)"


def test_logins_that_are_missing_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    [finding] = check_hub({}, is_online=False)
    assert (finding.mark, finding.remedy) == ("warn", "hf auth login")
    [finding] = check_hub({"HF_HUB_OFFLINE": "1"}, is_online=False)
    assert finding.found == "HF_HUB_OFFLINE is set: only what is in the cache is found"
    netrc = tmp_path / "netrc"
    environ = {"NETRC": str(netrc)}
    assert not has_netrc_entry("api.wandb.ai", environ)
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    assert has_netrc_entry("api.wandb.ai", environ)
    assert not has_netrc_entry("wandb.example", environ)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0"}


@pytest.mark.parametrize(
    ("environ", "mark", "found"),
    [
        ({}, "ok", "none: fit starts one process"),
        (TORCHRUN, "ok", "torchrun, 16 processes, 8 of them on this host: fit needs --trainer.devices 8"),
        ({"WORLD_SIZE": "2"}, "warn", "WORLD_SIZE set, but not by torchrun"),
        (
            {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "3"},
            "ok",
            "SLURM, 16 tasks on 2 nodes: fit needs --trainer.devices 8 and --trainer.num_nodes 2",
        ),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "warn", "SLURM, 8 tasks on 1 nodes, without tasks per"),
        ({"SLURM_NTASKS": "8"}, "warn", "SLURM, 8 tasks on 1 nodes, not started by srun"),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, "ok", "SLURM, 8 tasks on 1 nodes, interactive"),
    ],
)
def test_launchers_are_told_apart(environ: dict[str, Any], mark: str, found: str) -> None:
    [finding] = check_launcher(environ)
    assert finding.mark == mark
    assert finding.found.startswith(found)
    assert bool(finding.remedy) == (mark == "warn")
