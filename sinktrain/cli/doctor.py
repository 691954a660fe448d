"""``sinktrain doctor``: what of this machine would stop, spoil or slow a run."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sinktrain.cli.parsing import make_parser
from sinktrain.cli.printing import print_json

if TYPE_CHECKING:
    from sinktrain.experiments.doctor_finding import Finding

DESCRIPTION = """\
Look at packages, compilers, devices, disk, variables, launcher and logins; let each device compute
something small. One line each: ok, warn or bad, what was found, and what to type.

Exit code 0 if nothing is bad, 2 if something is. Nothing leaves the machine unless --online."""

EXAMPLE = """\
sinktrain doctor
  sinktrain doctor --data.path shards --online --json"""


def doctor(arguments: list[str]) -> int:
    parser = make_parser("doctor", DESCRIPTION, EXAMPLE)
    parser.add_argument("--data.path", dest="shards", type=Path, metavar="SHARDS", help="look at these too")
    parser.add_argument("--online", action="store_true", help="ask the Hub whether it takes the token")
    options = parser.parse_args(arguments)
    from sinktrain.experiments.doctor import examine

    findings = examine(os.environ, options.shards, options.online)
    counts = Counter(finding.mark for finding in findings)
    if options.json:
        rows = [asdict(finding) for finding in findings]
        print_json({"findings": rows, "num_bad": counts["bad"], "num_warn": counts["warn"]})
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(lines(findings, columns)))
        print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['bad']} bad")
    return 2 if counts["bad"] else 0


def lines(findings: list[Finding], columns: int | None = None) -> list[str]:
    """``warn  disk  3.1 GiB free in the current folder -> free some``, in columns.

    Args:
        columns: of the terminal: what to type stands on a line of its own, whole, where both do not fit.
    """
    width = max(len(finding.subject) for finding in findings)
    told = []
    for finding in findings:
        line = f"{finding.mark:<5} {finding.subject:<{width}}  {' '.join(finding.found.split())}"
        remedy = f"-> {finding.remedy}" if finding.remedy else ""
        if columns is not None and remedy and len(f"{line} {remedy}") > columns:
            told += [line, " " * (width + 8) + remedy]
        else:
            told.append(f"{line} {remedy}".rstrip())
    return told
