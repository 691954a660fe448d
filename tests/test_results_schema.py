"""The published schema of results.json, and results read back through it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_results import example_results
from jsonschema import Draft202012Validator

from sinktrain.errors import ConfigError
from sinktrain.report.reading import GAINED_LISTS, read_results, results_validator

Results = dict[str, Any]

GAINED = {"sink_about", "null_mass_is_proxy", "train_seconds", "hardware", "documents_scored"}
"""Fields that results of an older version lack."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def problem(path: Path, content: str) -> str:
    """What reading says of a file, without the file's name."""
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_results(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(path)).removeprefix(": ")


def test_the_schema_is_a_valid_schema_of_draft_2020_12() -> None:
    schema = results_validator().schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    "options",
    [{}, {"seeds": True}, {"texts": ("a.txt", "b.txt")}, {"arms": ("vanilla", "zero", "gate")}],
    ids=["one", "seeds", "texts", "kinds"],
)
def test_results_are_read_as_they_were_written(path: Path, options: dict[str, Any]) -> None:
    results = example_results(**options)
    path.write_text(json.dumps(results), encoding="utf-8")
    assert read_results(path) == results
    assert read_results(path.parent) == results


def test_every_list_of_the_schema_is_required_and_may_be_empty(path: Path) -> None:
    """But those that older results lack, which are read as empty."""
    schema = results_validator().schema
    lists = {name for name, rule in schema["properties"].items() if rule.get("type") == "array"}
    assert lists == {name for name, value in example_results().items() if isinstance(value, list)}
    empty = {"schema_version": 1, "environment": {}, **{name: [] for name in lists}}
    path.write_text(json.dumps(empty), encoding="utf-8")
    assert read_results(path) == empty
    path.write_text(json.dumps({key: value for key, value in empty.items() if key not in GAINED_LISTS}))
    assert read_results(path) == empty
    for name in lists.difference(GAINED_LISTS):
        content = json.dumps({key: value for key, value in empty.items() if key != name})
        assert problem(path, content).startswith(f"the file has no {name};")


def only(results: Results, name: str, row: dict[str, Any]) -> Results:
    """Results that hold nothing but the models and one row."""
    empty = {key: [] for key, value in results.items() if isinstance(value, list) and key != "models"}
    return {**results, **empty, name: [row]}


OVER_SEEDS = example_results(seeds=True)


@pytest.mark.parametrize("name", [name for name, rows in OVER_SEEDS.items() if rows and type(rows) is list])
def test_rows_may_gain_fields_and_must_lose_none(path: Path, name: str) -> None:
    results = OVER_SEEDS
    row = results[name][0]
    content = only(results, name, row | {"of_a_later_version": {"any": "thing"}})
    path.write_text(json.dumps(content), encoding="utf-8")
    if name != "models":  # of which other rows speak
        assert read_results(path) == content
    for field in row:
        without = only(results, name, {key: value for key, value in row.items() if key != field})
        if field in GAINED:
            assert not list(results_validator().iter_errors(without))
        else:
            assert problem(path, json.dumps(without)).startswith(f"{name}[0] has no {field};")


# fmt: off
MENDS: list[tuple[Callable[[Results], Any], str]] = [
    (lambda r: r["perplexity"][3].update(loss_nats="low"),
     'perplexity[3].loss_nats is "low" but must be number'),
    (lambda r: r["models"][1].update(seed="one"), 'models[1].seed is "one" but must be integer or null'),
    (lambda r: r["models"][0]["sink"].pop("kind"), "models[0].sink has no kind"),
    (lambda r: r["paired"][0].update(interval="both"),
     'paired[0].interval is "both" but must be text or seeds'),
    (lambda r: r["paired"][0].update(interval="seeds"), "paired[0] has no num_seeds"),
    (lambda r: r["paired"][0].update(a_sinks=1), "paired[0] has no a_window"),
    (lambda r: r["paired"][0].update(ci95=[1]),
     "paired[0].ci95 is [1] but must be of at least this many values: 2"),
    (lambda r: r["removal"][0].update(ci95=[1, 2, 3]), "removal[0].ci95 is [1, 2, 3] but must be of at most"),
    (lambda r: r["streameval"][7].update(accuracy=1.5),
     "streameval[7].accuracy is 1.5 but must be at most 1"),
    (lambda r: r["latency"][0].update(batch=0), "latency[0].batch is 0 but must be at least 1"),
    (lambda r: r["norms"][0].update(weights="old"),
     'norms[0].weights is "old" but must be trained or initial'),
    (lambda r: r.update(verified={}), "verified is {} but must be array"),
    (lambda r: r["norms"][2].update(model="x" * 999),
     f'norms[2].model is "{"x" * 999}", which is not in models'),
    (lambda r: r["paired"][0].update(b="x"), 'paired[0].b is "x", which is not in models'),
    (lambda r: r["norms"][0].update(layer="x" * 999), f'norms[0].layer is "{"x" * 58}… but must be integer'),
]
# fmt: on


@pytest.mark.parametrize(("mend", "words"), MENDS, ids=[words.split(" ")[0] for _, words in MENDS])
def test_a_wrong_field_is_named_with_its_place_and_what_would_do(
    path: Path, mend: Callable[[Results], Any], words: str
) -> None:
    results = example_results()
    mend(results)
    said = problem(path, json.dumps(results))
    assert said.startswith(words)
    assert said.endswith("; measure again, or mend the file")


def test_rows_over_seeds_name_arms(path: Path) -> None:
    results = example_results(seeds=True)
    pair = results["paired"][-1]
    assert pair["interval"] == "seeds"
    said = problem(path, json.dumps(only(results, "paired", pair | {"a": "sink-seed1"})))
    assert said.startswith('paired[0].a is "sink-seed1", which is not in models')


@pytest.mark.parametrize("version", [2, "1", True, [1]])
def test_another_schema_version_is_refused_whatever_else_is_wrong(path: Path, version: object) -> None:
    said = problem(path, json.dumps({"schema_version": version}))
    assert said.startswith(f" is of schema version {json.dumps(version)}, this sinktrain ")
    assert said.endswith(" reads 1; use the sinktrain that wrote it, or measure again")


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"metrics": {}}'])
def test_other_json_is_no_result(path: Path, content: str) -> None:
    assert "is not a results.json of sinktrain: it has no schema_version" in problem(path, content)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"schema_version": 1,', "Expecting property name"),
        ('{"schema_version": NaN}', "NaN is no number of JSON"),
        ('{"schema_version": 1, "x": 1e999}', "1e999 is too large a number"),
        ("[" * 100_000, "maximum recursion"),
    ],
    ids=["cut", "nan", "huge", "deep"],
)
def test_what_is_not_json_is_said_to_be_so(path: Path, content: str, why: str) -> None:
    said = problem(path, content)
    assert said.startswith(" is not JSON (")
    assert why in said
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_results(path)


def test_a_missing_file_is_named(path: Path) -> None:
    for missing in (path, path.parent):
        with pytest.raises(ConfigError) as error:
            read_results(missing)
        assert str(error.value) == (
            f"{path} cannot be read (No such file or directory); name a results.json of sinktrain compare"
        )


RENDER_WITHOUT_TORCH = """
import sys
for name in ("torch", "lightning", "transformers"):
    sys.modules[name] = None
from pathlib import Path
from sinktrain.report.reading import read_results
from sinktrain.report.terminal import terminal_table
from sinktrain.report.write import write_report
results = read_results(Path(sys.argv[1]))
write_report(results, Path(sys.argv[2]))
print(terminal_table(results))
"""


def test_a_report_is_rendered_again_where_torch_cannot_be_imported(path: Path, tmp_path: Path) -> None:
    results = example_results()
    path.write_text(json.dumps(results), encoding="utf-8")
    again = tmp_path / "again"
    done = subprocess.run(
        [sys.executable, "-c", RENDER_WITHOUT_TORCH, str(path), str(again)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "book.txt: perplexity" in done.stdout
    assert json.loads((again / "results.json").read_text(encoding="utf-8")) == results
    assert {file.name for file in again.iterdir()} == {"report.html", "results.json", "results.md"}
