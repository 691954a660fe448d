"""The three files of a report: results.json, results.md, report.html."""

from __future__ import annotations

import json
from pathlib import Path

from sinktrain.errors import ConfigError
from sinktrain.files import write_json, write_text
from sinktrain.report.markdown import results_markdown
from sinktrain.report.page import report_page
from sinktrain.report.wording import Results

MEASURED = "measured"
"""Folder of a report that keeps measurements, so that a comparison that was cut off goes on."""


def check_report_folder(out: Path) -> None:
    """Raise ConfigError if ``out`` holds anything but a report or what was measured for one."""
    others = [path for path in out.iterdir() if path.name != MEASURED] if out.is_dir() else []
    if out.is_file() or (others and not _is_report(out / "results.json")):
        raise ConfigError(f"--out {out} holds something that is not a report; choose another folder")


def write_report(results: Results, out: Path) -> None:
    """Write all three into ``out``, each whole or not at all; a report that stood there is replaced.

    Raises:
        ValueError: a number in ``results`` is NaN or infinite, which JSON can't say.
    """
    write_json(out / "results.json", results)
    write_text(out / "results.md", results_markdown(results))
    write_text(out / "report.html", report_page(results))


def _is_report(results: Path) -> bool:
    """Whether a results.json is one of ours: others use that name too."""
    try:
        return "schema_version" in json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
