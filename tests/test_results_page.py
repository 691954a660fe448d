"""RESULTS.md says what the committed results.json files say."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sinktrain.cli import main
from sinktrain.model.checkpoints import load_model
from sinktrain.report.reading import read_results
from sinktrain.report.wording import layout_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "results"
MODELS = ROOT / "data" / "models"


@pytest.fixture
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("results_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("results_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_table_is_that_of_its_results(script: ModuleType) -> None:
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert len(script.BLOCK.findall(page)) == page.count("<!-- data/") == page.count("<!-- end -->") > 0
    assert script.rendered(page) == page


def test_every_results_file_is_on_the_page_and_readable() -> None:
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    named = set(re.findall(r"<!-- (data/results/\S+):", page))
    folders = {path.parent for path in ROOT.glob("data/results/*/results.json")}
    assert {ROOT / name for name in named} == folders
    for folder in folders:
        results = read_results(folder)
        assert results["perplexity"]
        assert not re.search(r"/(tmp|home|work|root)/", json.dumps(results))


def test_a_further_seed_is_told_with_what_the_studys_results_expect_of_it(script: ModuleType) -> None:
    study, further = (read_results(ROOT / f"data/results/ten-minutes-h100{end}") for end in ("", "-seed-4"))
    expected = {(row["arm"], layout_name(row)): row["prediction95"] for row in study["arms"]}
    arms = {model["name"]: model["arm"] for model in further["models"]}
    table = script.further_seed_table(further, "ten-minutes-h100")
    told = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    num_inside: dict[str, int] = {}
    for row in further["perplexity"]:
        arm, layout = arms[row["model"]], layout_name(row)
        low, high = expected[arm, layout]
        is_inside = low <= row["loss_nats"] <= high
        num_inside[layout] = num_inside.get(layout, 0) + is_inside
        words = f"({'in' if is_inside else 'NOT in'} {low:.3f} to {high:.3f})"
        assert told[arm][layout] == f"{row['loss_nats']:.3f} {words}"
    assert {layout: told["inside"][layout] for layout in num_inside} == {
        layout: f"{count} of {len(arms)}" for layout, count in num_inside.items()
    }


def commands(page: Path) -> list[list[str]]:
    """The commands of sinktrain that a page shows, without their placeholders' lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"`sinktrain ([^`]+)`|^sinktrain ([^`\n]+)$", text, re.MULTILINE)
    return [shlex.split(quoted or alone) for quoted, alone in found if "KIND" not in quoted]


@pytest.mark.parametrize("page", ["RESULTS.md", "data/README.md", "data/models/README.md"])
def test_every_command_on_a_page_has_all_that_it_needs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(ROOT / page)
    assert found
    for command in found:
        assert main([*command, "--no-such-option"]) == 2, command
        assert "no-such-option" in capsys.readouterr().err, command


def test_a_changed_number_is_found_and_mended(tmp_path: Path) -> None:
    for name in ("RESULTS.md", "data/results", "scripts/results"):
        to = tmp_path / name
        to.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to)
    page = tmp_path / "RESULTS.md"
    true = page.read_text(encoding="utf-8").partition("**On other text.**")[0]  # which is soon rendered
    page.write_text(re.sub(r"\| 2\.845 \|", "| 2.854 |", true, count=1), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != true
    check = [sys.executable, str(tmp_path / "scripts" / "results"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert "RESULTS.md differs from data/results" in found.stderr
    subprocess.run(check[:-1], check=True)
    assert page.read_text(encoding="utf-8") == true
    subprocess.run(check, check=True)
    page.write_text(true.replace("<!-- end -->", "", 1), encoding="utf-8")
    torn = subprocess.run(check[:-1], capture_output=True, text=True, check=False)
    assert torn.returncode == 2
    assert "RESULTS.md has a table that begins and does not end" in torn.stderr


def test_the_shipped_pair_differs_in_its_sink_alone_and_is_small() -> None:
    vanilla, token = (load_model(MODELS / arm) for arm in ("vanilla", "token"))
    assert (vanilla.config.sink.kind, token.config.sink.kind) == ("none", "token")
    assert vanilla.config.network == token.config.network
    facts = [
        json.loads((MODELS / arm / "config.json").read_text())["sinktrain"] for arm in ("vanilla", "token")
    ]
    for fact in ("seed", "tokens_seen", "data_fingerprint", "code_version"):
        assert facts[0][fact] == facts[1][fact]
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 24e6
