"""Whether the packages that are installed are those that sinktrain works with, and can be trusted."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sinktrain import __version__
from sinktrain.experiments.doctor_finding import Finding, Mark

COMPROMISED = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Wheels on the package index that held malicious code: GHSA-w37p-236h-pfx3 (30 April 2026)."""

OPTIONAL = {
    "deepspeed": ("ZeRO", "pip install 'sinktrain[deepspeed]'"),
    "wandb": ("--config wandb", "pip install 'sinktrain[wandb]'"),
    "tensorboard": ("--config tensorboard", "pip install tensorboard"),
    "litgpt": ("a peer of bench", "pip install litgpt"),
}
"""What each package is for, and how it is had."""


def check_packages() -> list[Finding]:
    """Python and every package that sinktrain needs, against the ranges of its own metadata."""
    try:
        needed = [Requirement(line) for line in requires("sinktrain") or []]
        pythons = SpecifierSet(metadata("sinktrain")["Requires-Python"])
    except PackageNotFoundError:
        found = f"{__version__}, not installed as a package: versions are not checked"
        return [Finding("sinktrain", "warn", found, "pip install -e . in its repository")]
    always = [requirement for requirement in needed if "extra" not in str(requirement.marker)]
    return [
        Finding("sinktrain", "ok", __version__),
        judge_python(platform.python_version(), pythons),
        *(judge_package(requirement, installed_version(requirement.name)) for requirement in always),
        *(_optional(name) for name in OPTIONAL),
    ]


def judge_python(found: str, wanted: SpecifierSet) -> Finding:
    if wanted.contains(found, prereleases=True):
        return Finding("Python", "ok", f"{found} ({wanted})")
    return Finding("Python", "bad", f"{found}, but sinktrain needs {wanted}", f"use Python {wanted}")


def judge_package(wanted: Requirement, found: str | None) -> Finding:
    """A package that sinktrain needs.

    Args:
        found: installed version; None where there is none.
    """
    name, versions = wanted.name, _range(wanted.specifier)
    install = f"pip install '{name}{versions}'"
    if found is None:
        return Finding(name, "bad", "not installed", install)
    if (name, found) in COMPROMISED:
        return Finding(
            name,
            "bad",
            f"{found} is a compromised release (GHSA-w37p-236h-pfx3)",
            f"{install}, and replace the keys and tokens that this machine holds",
        )
    if not wanted.specifier.contains(found, prereleases=True):
        return Finding(name, "bad", f"{found}, but sinktrain works with {versions}", install)
    return Finding(name, "ok", f"{found} ({versions})")


def _range(versions: SpecifierSet) -> str:
    """``>=2.6.6,<2.7``: the lowest first."""
    return ",".join(sorted(map(str, versions), reverse=True))


def check_compilers() -> list[Finding]:
    """Triton, and the C compiler that it and torch.compile build their launchers with."""
    import torch

    needed: Mark = "bad" if torch.cuda.is_available() else "warn"  # the CPU trains uncompiled by default
    triton = Finding("Triton", "ok", installed_version("triton") or "importable")
    if find_spec("triton") is None:
        triton = Finding(
            "Triton", needed, "not installed: no fused kernels, no torch.compile", "pip install triton"
        )
    compiler = c_compiler()
    if compiler is None:
        remedy = "apt-get install gcc, or set CC to one"
        return [triton, Finding("C compiler", needed, "none: Triton and torch.compile need one", remedy)]
    return [triton, Finding("C compiler", "ok", compiler)]


def c_compiler() -> str | None:
    """Name of the compiler that Triton would use: ``CC``, then those that it looks for."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["clang", "gcc", "cc"]
    return next((os.path.basename(name) for name in names if shutil.which(name)), None)


def _optional(name: str) -> Finding:
    use, install = OPTIONAL[name]
    found = installed_version(name)
    return Finding(name, "ok", found or f"not installed ({use}: {install})")


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
