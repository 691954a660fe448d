"""Runs started by torchrun, srun or scripts/slurm are those that one process makes, and tell as much."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import KubeflowEnvironment, LightningEnvironment
from test_fit import assert_same_state, checkpoint
from tiny_shards import tiny_run, wait_for
from two_processes import CONSTANT, assert_close

from sinktrain.cli import main
from sinktrain.errors import ConfigError
from sinktrain.training import launchers
from sinktrain.training.continuing import Continuation
from sinktrain.training.fit import fit
from sinktrain.training.launchers import find_once, told_once_a_host, torchrun_devices
from sinktrain.training.module import Pretraining

ROOT = Path(__file__).resolve().parents[1]
FEW = ("PATH", "HOME", "PYTHONPATH", "TMPDIR", "LANG")

# -- a mistake is told once -----------------------------------------------------------------------

RANKS = {
    "alone": ({}, False),
    "first of torchrun": ({"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "0"}, False),
    "second of torchrun": ({"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "1"}, True),
    "first of another host": ({"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "0", "RANK": "8"}, False),
    "second of srun": ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, True),
    "second of Lightning": ({"LOCAL_RANK": "1"}, False),
    "second of Lightning within SLURM": (
        {"LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        False,
    ),
}


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_behind_the_first_of_a_host_wait_to_be_ended(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, should_wait = RANKS[rank]
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(launchers.time, "sleep", waited.append)
    with pytest.raises(ConfigError, match="a mistake"), told_once_a_host():
        raise ConfigError("a mistake")  # told after all, if nobody ended this rank
    assert waited == ([launchers.PATIENCE_S] if should_wait else [])


# -- found once -----------------------------------------------------------------------------------


@pytest.fixture
def a_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A free one, where ranks are told to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    yield port
    launchers._store.cache_clear()  # a process meets others once


def a_rank(rank: int, environment: Any) -> Any:
    strategy = SimpleNamespace(cluster_environment=environment)
    return SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)


class Finder:
    """Looks once, and takes a moment; another time it would find something else."""

    def __init__(self, error: Exception | None = None) -> None:
        self.times = 0
        self.error = error

    def __call__(self) -> Continuation:
        self.times += 1
        time.sleep(0.1)
        if self.error is not None:
            raise self.error
        return Continuation(Path(f"step-{self.times}.ckpt"), {Path("last.ckpt"): "damaged"})


def of_both_ranks(find: Callable[[], Continuation]) -> list[Any]:
    """What two ranks find, or raise; they are threads here, and meet as processes do."""

    def ask(rank: int) -> Any:
        try:
            return find_once(a_rank(rank, KubeflowEnvironment()), find)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, (1, 0)))


@pytest.mark.usefixtures("a_port")
def test_rank_0_alone_looks_and_all_get_what_it_found() -> None:
    find = Finder()
    expected = Continuation(Path("step-1.ckpt"), {Path("last.ckpt"): "damaged"})
    assert of_both_ranks(find) == [expected, expected]
    assert find.times == 1


@pytest.mark.usefixtures("a_port")
@pytest.mark.parametrize(
    "error", [ConfigError("all are damaged"), PermissionError(13, "no permission", "runs/x")]
)
def test_what_rank_0_raises_all_raise(error: Exception) -> None:
    other, own = of_both_ranks(Finder(error))
    assert own is error
    assert (type(other), str(other)) == (type(error), str(error))


def test_ranks_that_lightning_starts_are_handed_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (launchers.FOUND, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is gone again behind the test
        monkeypatch.delenv(name)
    find, environment = Finder(), LightningEnvironment()
    first = find_once(a_rank(0, environment), find)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_once(a_rank(1, environment), find) == first
    assert find.times == 1


def test_one_process_looks_for_itself() -> None:
    find = Finder()
    find_once(SimpleNamespace(world_size=1), find)  # type: ignore[arg-type]
    assert find.times == 1


# -- torchrun -------------------------------------------------------------------------------------


def torchrun(arguments: list[str]) -> subprocess.Popen[str]:
    """Two processes, as a user starts them; nothing of pytest's own runs is in their environment.

    Without the ``--`` torchrun takes ``--run`` for an abbreviation of its ``--run-path`` (Python 3.11).
    """
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- sinktrain fit"
    return subprocess.Popen(
        [sys.executable, *launch.split(), *arguments],
        env={name: os.environ[name] for name in FEW if name in os.environ} | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


TWO = ["--config", "ddp", "--trainer.devices", "2", "--data.micro_batch", "2"]


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains(shards: Path, tmp_path: Path) -> None:
    """Started as a new run, and again when there is nothing left to do: told once each."""
    fit(tiny_run(shards, tmp_path / "whole", *CONSTANT, "--config", "sink"))
    arguments = tiny_run(shards, tmp_path / "parts", *CONSTANT, "--config", "sink", *TWO)
    for told in ("parts: token, 0.1m parameters, from the start", "parts: finished already; a larger"):
        process = torchrun(arguments)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert stderr.count(told) == 1, stderr
    assert_close(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_torchrun_tells_a_mistake_once_and_reports_exit_code_2(shards: Path, tmp_path: Path) -> None:
    """torchrun's own exit code is 1 whatever its processes end with; its report names theirs."""
    process = torchrun(tiny_run(shards, tmp_path / "run", *TWO, "--model.learning_rate", "-1"))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert stderr.count("sinktrain fit: model.learning_rate is -1.0; use more than 0") == 1, stderr
    assert re.search(r"exitcode\s*: 2 ", stderr), stderr
    assert not (tmp_path / "run").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["a rank", "torchrun"])
def test_a_signal_under_torchrun_saves_and_exits_with_143(
    signalled: str, shards: Path, tmp_path: Path
) -> None:
    steps = ["--trainer.max_steps", "100000", "--checkpoint.every_n_steps", "100000"]
    process = torchrun(tiny_run(shards, tmp_path / "run", *CONSTANT, *TWO, *steps))
    wait_for(20, tmp_path / "run", process)
    os.kill(children(process.pid)[1] if signalled == "a rank" else process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert stderr.count("stopped by SIGTERM and saved; the same command continues") == 1, stderr
    if signalled == "a rank":
        assert re.search(r"exitcode\s*: 143 ", stderr), stderr
    assert process.returncode == 1
    stopped_at = checkpoint(tmp_path / "run")["global_step"]
    assert stopped_at >= 20


# -- SLURM ----------------------------------------------------------------------------------------


def command(folder: Path, name: str, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)
    return path


TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "node1",
}


@pytest.fixture
def one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as the only task of a SLURM job; returns the file that notes what scontrol is asked."""
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    asked = tmp_path / "asked"
    command(tmp_path / "bin", "scontrol", f'echo "$*" >>"{asked}"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return asked


def test_a_slurm_task_trains_stops_on_sigusr1_and_does_not_requeue_itself(
    one_task: Path,
    shards: Path,
    tmp_path: Path,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lightning would ask scontrol from within the signal's handler: that is left to scripts/slurm."""
    real = Pretraining.training_step

    def training_step(module: Pretraining, *batch: object) -> None:
        real(module, *batch)
        if module.trainer.global_step == 6:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "training_step", training_step)
        assert main(["fit", *tiny_run(shards, tmp_path / "parts")]) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 and saved; the same command continues" in capsys.readouterr().err
    assert checkpoint(tmp_path / "parts")["global_step"] == 6
    assert_same_state(train("whole"), train("parts"))
    assert not one_task.exists()


def two_tasks(arguments: list[str], port: int) -> list[subprocess.Popen[str]]:
    """``sinktrain fit`` as srun starts it twice on one host."""
    environment = {name: os.environ[name] for name in FEW if name in os.environ}
    environment |= {**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_PORT": str(port)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("sinktrain")), "fit", *arguments]
    return [
        subprocess.Popen(
            command,
            env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended_as_by_srun(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes, and all that was told. Like ``--kill-on-bad-exit`` it ends the others with the first."""
    deadline = time.monotonic() + 120
    while not any(process.poll() for process in processes):
        if all(process.poll() == 0 for process in processes):
            break
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for process in processes:
        process.send_signal(signal.SIGTERM)  # those that have ended get none
    told = "".join(process.communicate(timeout=60)[1] for process in processes)
    return [process.returncode for process in processes], told


STEPS = ["--trainer.max_steps", "100000", "--checkpoint.every_n_steps", "100000"]


SLOW_END = """
import time
from lightning.pytorch.callbacks import Callback

class SlowEnd(Callback):
    def on_exception(self, trainer, *_):
        time.sleep(8 * trainer.is_global_zero)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_slurm_task_ends_both_with_its_code(
    rank: int, shards: Path, tmp_path: Path, a_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun reports the highest: SIGTERM's 143 of a task that it ended would hide the 138 of the others.

    Here rank 0 has more to do at the end, as with a logger that uploads.
    """
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    steps = [*STEPS, "--trainer.callbacks+=slow_end.SlowEnd"]
    processes = two_tasks(tiny_run(shards, tmp_path / "run", *CONSTANT, *TWO, *steps), a_port)
    wait_for(20, tmp_path / "run", processes[0])
    processes[rank].send_signal(signal.SIGUSR1)
    codes, told = ended_as_by_srun(processes)
    assert codes == [138, 138], told
    assert told.count("stopped by SIGUSR1 and saved; the same command continues") == 1, told


@pytest.mark.slow
def test_a_run_that_only_skips_ends_all_tasks_with_exit_code_2(
    shards: Path, tmp_path: Path, a_port: int
) -> None:
    spoilt = ["--model.learning_rate", "1e30", "--model.max_skipped_steps", "3"]
    processes = two_tasks(tiny_run(shards, tmp_path / "run", *TWO, *STEPS, *spoilt), a_port)
    codes, told = ended_as_by_srun(processes)
    assert codes == [2, 2], told
    assert told.count("were all skipped") == 1, told


@pytest.mark.slow
def test_slurm_tasks_continue_from_the_newest_whole_checkpoint(
    shards: Path, tmp_path: Path, train: Callable[..., Path], a_port: int
) -> None:
    """They meet for that before they have a process group, at the same address."""
    whole = train("whole", *CONSTANT)
    newest = (train("run", *CONSTANT, "--trainer.max_steps", "8") / "checkpoints" / "last.ckpt").resolve()
    newest.write_bytes(newest.read_bytes()[:-100])
    codes, told = ended_as_by_srun(
        two_tasks(tiny_run(shards, whole.with_name("run"), *CONSTANT, *TWO), a_port)
    )
    assert codes == [0, 0], told
    assert told.count("continuing from the one before") == 1, told
    assert told.count("from step-00000004.ckpt") == 1, told
    assert_close(whole, whole.with_name("run"))


class Job:
    """A job of scripts/slurm, on a SLURM whose srun ends with a chosen code."""

    def __init__(self, folder: Path) -> None:
        self.asked = folder / "asked"
        for name, ending in (("srun", 'exit "$SRUN_ENDS"'), ("scontrol", "")):
            command(folder / "bin", name, f'printf "%s|" {name} "$@" >>"{self.asked}"', ending)
        self.variables = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "SHARDS": "/data/some shards",
            "RUN": "/data/run",
            "CONFIGS": "pythia-160m sink ddp",
        }

    def run(self, ends: int = 0, without: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in (self.variables | more).items() if name != without}
        return subprocess.run(
            ["bash", ROOT / "scripts/slurm"],
            env=variables | {"SRUN_ENDS": str(ends)},
            capture_output=True,
            text=True,
        )


@pytest.mark.parametrize("code", [0, 1, 2, 138, 143])
def test_script_requeues_what_ran_out_of_time_and_passes_every_exit_code_on(
    code: int, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    assert job.run(code).returncode == code
    assert ("scontrol|requeue|7|" in job.asked.read_text()) == (code == 138)


def test_script_starts_one_task_for_each_gpu_and_ends_all_with_the_first(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.run(OPTIONS="--data.micro_batch 16", SINKTRAIN="/opt/sinktrain")
    assert job.asked.read_text() == (
        "srun|--kill-on-bad-exit=1|/opt/sinktrain|fit|--config|pythia-160m|--config|sink|--config|ddp|"
        "--data.path|/data/some shards|--run|/data/run|--trainer.num_nodes|2|--trainer.devices|4|"
        "--data.micro_batch|16|"
    )
    head = (ROOT / "scripts/slurm").read_text().partition("\nset ")[0]
    assert "#SBATCH --signal=SIGUSR1@120" in head.splitlines()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("SHARDS", "slurm: SHARDS is not set; see scripts/slurm --help\n"),
        ("CONFIGS", "slurm: CONFIGS is not set; see scripts/slurm --help\n"),
        (
            "SLURM_JOB_ID",
            "slurm: this is no SLURM job; hand the script to sbatch, see scripts/slurm --help\n",
        ),
    ],
)
def test_script_says_what_is_missing_in_one_line(missing: str, told: str, tmp_path: Path) -> None:
    done = Job(tmp_path).run(without=missing)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_script_parses_is_executable_and_its_help_is_its_head() -> None:
    script = ROOT / "scripts/slurm"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith('usage: SHARDS=DIR RUN=DIR CONFIGS="NAME …" sbatch')
    assert "SBATCH" not in shown


def test_torchrun_says_how_many_devices_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun_devices(3) == {}
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for devices in (1, 2, "auto", "-1"):
        assert torchrun_devices(devices) == {"devices": 2, "num_nodes": 2}
    with pytest.raises(
        ConfigError, match=r"^--trainer\.devices 3, but torchrun started 2 processes .*leave it"
    ):
        torchrun_devices(3)


@pytest.mark.slow
def test_slurm_tasks_tell_once_that_all_is_damaged(
    shards: Path, tmp_path: Path, train: Callable[..., Path], a_port: int
) -> None:
    run = train("run", *CONSTANT, "--trainer.max_steps", "4")
    newest = (run / "checkpoints" / "last.ckpt").resolve()
    newest.write_bytes(newest.read_bytes()[:-100])
    codes, told = ended_as_by_srun(two_tasks(tiny_run(shards, run, *CONSTANT, *TWO), a_port))
    assert codes == [2, -15], told
    assert told.count("is damaged") == 1, told
