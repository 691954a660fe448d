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

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGTERM@120
#SBATCH --output={out}/logs/slurm-%a.log
# Made by sinktrain study; a task that runs out of time has saved, and the same study continues it.
set -euo pipefail
runs=({runs})
read -r arm seed <<<"${{runs[$SLURM_ARRAY_TASK_ID]}}"
exec {command} --stages train --only "$arm" --seeds "$seed"
"""


def submit(name: str, command: Sequence[str], runs: Sequence[StudyRun], out: Path) -> list[str]:
    """Write the array's script into the study's folder and hand it to ``sbatch``.

    Args:
        command: that carries out the study in ``out``, without stages.

    Returns:
        The ids of both jobs.

    Raises:
        ConfigError: there is no SLURM here, or it refuses.
    """
    script = out / "slurm.sh"
    pairs = " ".join(shlex.quote(f"{run.arm.name} {run.seed}") for run in runs)
    text = SCRIPT.format(name=name, last=len(runs) - 1, out=out, runs=pairs, command=shlex.join(command))
    write_text(script, text)
    (out / "logs").mkdir(exist_ok=True)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"--launcher slurm: no sbatch here; {script} is written, hand it in where there is one"
        )
    array = _sbatch(str(script))
    rest = shlex.join([*command, "--stages", "compare,publish"])
    log = f"--output={out}/logs/slurm-compare.log"
    return [array, _sbatch(f"--dependency=afterany:{array}", "--gpus-per-node=1", log, f"--wrap={rest}")]


def _sbatch(*arguments: str) -> str:
    found = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ConfigError(f"sbatch refuses: {first_line(ValueError(found.stderr))}")
    return found.stdout.strip().split(";")[0]
