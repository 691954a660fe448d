"""What of a machine would stop, spoil or slow a run: found in seconds, before the run finds it in hours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sinktrain.errors import first_line
from sinktrain.experiments.doctor_finding import Finding
from sinktrain.experiments.doctor_packages import check_compilers, check_packages
from sinktrain.experiments.doctor_surroundings import (
    check_hub,
    check_launcher,
    check_machine,
    check_shards,
    check_variables,
    check_wandb,
)
from sinktrain.progress import progress_bar

QUIET_S = 2.0
"""Only an examination that takes longer shows its progress."""


def examine(environ: Mapping[str, str], shards: Path | None = None, is_online: bool = False) -> list[Finding]:
    """Look at everything; one finding or more for each subject.

    Args:
        environ: the variables to look at.
        shards: prepared shards to look at too.
        is_online: ask the Hub whether it takes the token; otherwise nothing leaves the machine.
    """
    parts: dict[str, Callable[[], list[Finding]]] = {
        "packages": check_packages,
        "compilers": check_compilers,
        "devices": _check_devices,
        "machine": lambda: check_machine(environ),
        "variables": lambda: check_variables(environ),
        "launcher": lambda: check_launcher(environ),
        "Hub": lambda: check_hub(environ, is_online),
        "wandb": lambda: check_wandb(environ),
    }
    if shards is not None:
        parts["shards"] = lambda: check_shards(shards)
    findings = []
    with progress_bar(desc="doctor", total=len(parts), delay=QUIET_S) as bar:
        for name, look in parts.items():
            findings += looked_at(name, look)
            bar.update()
    return findings


def looked_at(name: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What a part found; that it could not look is a finding too."""
    try:
        return look()
    except Exception as error:  # whatever is wrong with this machine, the other parts are still examined
        return [Finding(name, "bad", f"could not be examined: {first_line(error)}", "mend that first")]


def _check_devices() -> list[Finding]:
    from sinktrain.experiments.doctor_devices import check_devices  # torch, which may not be importable

    return check_devices()
