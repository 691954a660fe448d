"""The wheel: it holds the configs, and works from them outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

build = pytest.importorskip("hatchling.build", reason="comes with the dev extra")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    name: str = build.build_wheel(str(tmp_path))
    return tmp_path / name


def test_wheel_holds_package_configs_licence_and_command_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
        commands = archive.read(f"{metadata}/entry_points.txt").decode()
    assert "sinktrain = sinktrain.cli:main" in commands
    assert f"{metadata}/licenses/LICENSE" in names
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"quickstart.yaml", "sink.yaml", "pythia-160m.yaml"} <= configs
    assert {f"sinktrain/_configs/{name}" for name in configs} <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sinktrain").rglob("*.py")}
    assert modules <= names
    assert {name.partition("/")[0] for name in names} == {"sinktrain", metadata}


@pytest.mark.slow
def test_installed_wheel_finds_its_configs_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    config = site / "sinktrain/_configs/pythia-160m.yaml"  # marked, to be told from the repository's
    config.write_text(config.read_text().replace("max_steps: 143000", "max_steps: 142999"))
    done = subprocess.run(
        [site / "bin/sinktrain", "fit", "--config", "pythia-160m", "--print_config"],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 768" in done.stdout
    assert "max_steps: 142999" in done.stdout
