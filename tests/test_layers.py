"""Folders import only from folders before them, as pyproject.toml lists them."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports


def test_every_import_goes_down_the_road() -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert lint_imports(str(pyproject), no_cache=True) == 0
