"""A report in Weights & Biases, recorded by a stand-in for the package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from example_results import example_results

from sinktrain.errors import ConfigError
from sinktrain.report.findings import verdict_sentences
from sinktrain.report.wandb_log import log_report
from sinktrain.report.write import write_report


class StandIn(ModuleType):
    """Keeps what it is given, under wandb's names."""

    class Error(Exception):
        """What wandb raises."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=self.Error)
        self.settings: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.is_open = False

    def init(self, **settings: Any) -> StandIn:
        self.settings = settings
        return self

    def __enter__(self) -> StandIn:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def log(self, values: dict[str, Any]) -> None:
        assert self.is_open
        self.logged |= values

    def log_artifact(self, artifact: Any) -> None:
        assert self.is_open
        self.artifacts.append(artifact)

    def Table(self, columns: list[str], data: list[list[Any]]) -> SimpleNamespace:  # noqa: N802
        assert {len(row) for row in data} == {len(columns)}
        return SimpleNamespace(columns=columns, data=data)

    def Html(self, path: str, inject: bool) -> str:  # noqa: N802
        return Path(path).read_text(encoding="utf-8")

    def Plotly(self, figure: Any) -> Any:  # noqa: N802
        return figure

    def Artifact(self, name: str, type: str) -> SimpleNamespace:  # noqa: N802
        files: list[str] = []
        return SimpleNamespace(name=name, type=type, files=files, add_file=files.append)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return example_results()


@pytest.fixture(scope="module")
def out(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_report(results, folder)
    return folder


def test_every_filled_list_is_logged_with_all_its_rows_and_numbers(
    results: dict[str, Any], out: Path, wandb: StandIn
) -> None:
    log_report(results, out, "sinks")
    tables = {
        name.removeprefix("tables/"): table
        for name, table in wandb.logged.items()
        if name.startswith("tables/")
    }
    assert tables.keys() == {name for name, rows in results.items() if isinstance(rows, list) and rows}
    for name, table in tables.items():
        rows = results[name]
        num_points = sum(len(row["stream_pos"]) for row in rows) if name == "position_loss" else len(rows)
        assert len(table.data) == num_points
    first = dict(zip(tables["paired"].columns, tables["paired"].data[0], strict=True))
    pair = results["paired"][0]
    assert (first["a"], first["delta_nats"]) == (pair["a"], pair["delta_nats"])
    assert [first["ci95.0"], first["ci95.1"]] == pair["ci95"]
    assert first["a_sinks"] is None
    assert {"sink.kind", "sink.token_ids.0"} <= set(tables["models"].columns)


def test_the_summary_holds_the_verdict_and_numbers_to_compare_runs_by(
    results: dict[str, Any], out: Path, wandb: StandIn
) -> None:
    log_report(results, out, "sinks")
    assert wandb.summary["verdict"] == " ".join(verdict_sentences(results))
    loss = next(
        row for row in results["perplexity"] if (row["model"], row["sinks"], row["window"]) == ("sink", 1, 63)
    )
    assert wandb.summary["perplexity/book.txt/sink/1+63"] == loss["perplexity"]
    assert wandb.summary["difference_nats/book.txt/sink/0+64 - 1+63"] > 0.8
    assert wandb.summary["sink_metric/sink/0"] > 0.4


def test_page_plots_and_results_file_are_logged(results: dict[str, Any], out: Path, wandb: StandIn) -> None:
    log_report(results, out, "sinks")
    assert wandb.logged["report"] == (out / "report.html").read_text(encoding="utf-8")
    plots = {name: plot for name, plot in wandb.logged.items() if name.startswith("plots/")}
    assert len(plots) > 5
    for plot in plots.values():
        assert json.loads(plot.to_json())["data"]
    (artifact,) = wandb.artifacts
    assert (artifact.type, artifact.files) == ("results", [str(out / "results.json")])
    assert wandb.settings["project"] == "sinks"
    assert wandb.settings["name"] == out.name
    assert Path(wandb.settings["dir"]) == out
    assert not wandb.is_open


def test_missing_wandb_is_named_with_its_remedy(
    results: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrain.report.wandb_log.find_spec", lambda _: None)
    with pytest.raises(ConfigError) as error:
        log_report(results, out, "sinks")
    assert str(error.value) == (
        "--wandb sinks needs the package wandb; pip install 'sinktrain[wandb]', or leave it out"
    )


def test_a_refusal_of_wandb_is_one_line_with_its_remedy(
    results: dict[str, Any], out: Path, wandb: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise wandb.Error("api_key not configured (no-tty)\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError) as error:
        log_report(results, out, "sinks")
    assert str(error.value) == (
        "--wandb sinks: wandb refused the run (api_key not configured (no-tty)); "
        "run wandb login, or set WANDB_MODE=offline; the report itself is written"
    )
