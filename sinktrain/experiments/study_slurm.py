"""A study on SLURM: one array job that trains, a task for each run, and a job behind it that compares."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sinktrain.errors import ConfigError, first_line
from sinktrain.experiments.study_file import StudyRun
from sinktrain.files import write_text
from sinktrain.report.wording import printable

SCRIPT = """#!/usr/bin/env bash
#SBATCH {name}
#SBATCH --array=0-{last}
{gpus}#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:SIGTERM@120
#SBATCH {output}
# Made by sinktrain study; a task that runs out of time has saved, and the same study continues it.
set -euo pipefail
runs=({runs})
read -r arm seed <<<"${{runs[$SLURM_ARRAY_TASK_ID]}}"
exec {command} --stages train --only "$arm" --seeds "$seed"
"""


def submit(
    name: str,
    command: Sequence[str],
    runs: Sequence[StudyRun],
    stages: Sequence[str],
    num_gpus: int,
    out: Path,
) -> list[str]:
    """Write the array's script into the study's folder and hand it to ``sbatch``.

    Args:
        command: that carries out the study in ``out``, without stages.
        runs: to train, if any.
        stages: what follows the training; nothing, if empty.
        num_gpus: of each task; 0 for tasks on the CPU.

    Returns:
        The ids of the jobs.

    Raises:
        ConfigError: there is no SLURM here, or it refuses.
    """
    (out / "logs").mkdir(exist_ok=True)
    script = out / "slurm.sh"
    if runs:
        write_text(script, _script(name, command, runs, num_gpus, out))
    if shutil.which("sbatch") is None:
        written = f"; {script} is written, hand it in where there is one" if runs else ""
        raise ConfigError(f"--launcher slurm: no sbatch here{written}")
    jobs = [_sbatch(str(script))] if runs else []
    if stages:
        rest = shlex.join([*command, "--stages", ",".join(stages)])
        log = f"--output={out}/logs/slurm-compare.log"
        behind = [f"--dependency=afterany:{job}" for job in jobs]
        jobs.append(_sbatch(*behind, *_gpus(min(num_gpus, 1)), log, f"--wrap={rest}"))
    return jobs


def _script(name: str, command: Sequence[str], runs: Sequence[StudyRun], num_gpus: int, out: Path) -> str:
    """The array's script; sbatch reads quotes in its options as a shell does."""
    return SCRIPT.format(
        name=_option(f"--job-name={name}"),
        last=len(runs) - 1,
        gpus="".join(f"#SBATCH {option}\n" for option in _gpus(num_gpus)),
        output=_option(f"--output={str(out).replace('%', '%%')}/logs/slurm-%a.log"),
        runs=" ".join(shlex.quote(f"{run.arm.name} {run.seed}") for run in runs),
        command=shlex.join(command),
    )


def _option(typed: str) -> str:
    return shlex.quote(printable(typed))  # a line break would end the comment that it stands in


def _gpus(num_gpus: int) -> list[str]:
    return [f"--gpus-per-node={num_gpus}"] if num_gpus else []


def _sbatch(*arguments: str) -> str:
    found = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ConfigError(f"sbatch refuses: {first_line(ValueError(found.stderr))}")
    return found.stdout.strip().split(";")[0]
