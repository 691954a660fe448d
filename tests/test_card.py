"""A model card says what is known of a model, in the Hub's own form, and nothing of where it was made."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from example_results import example_results
from huggingface_hub import EvalResult, ModelCard, metadata_load
from tiny_models import edit_json, tiny_model, write_run
from tiny_shards import write_shards

from sinktrain.errors import ConfigError, ExportError
from sinktrain.model.checkpoints import describe, load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.publishing.card import Card, CardOptions, model_card
from sinktrain.publishing.card_compared import Compared, read_compared, without_paths
from sinktrain.publishing.card_metadata import licence_id
from sinktrain.publishing.card_picture import LEFT, RIGHT, WIDTH, streaming_picture, ticks
from sinktrain.publishing.card_results import PICTURE_FILE
from sinktrain.publishing.card_run import read_training
from sinktrain.publishing.export import export
from sinktrain.report.wording import layout_name, loss_interval_text, perplexity_text

SECRETS = ("hf_SECRETSECRETSECRETSECRETSECRET", "/home/alice", "alice", "gpu-node-17", "Call me Ishmael")


@pytest.fixture(scope="module")
def light(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, less its optimizer's state, which takes most of the time that a checkpoint is read in."""
    run = Path(shutil.copytree(undisturbed, tmp_path_factory.mktemp("light") / "run", symlinks=True))
    edit_checkpoint(run)
    return run


@pytest.fixture
def run(light: Path, tmp_path: Path) -> Path:
    """A real run of 12 steps, to be changed."""
    return Path(shutil.copytree(light, tmp_path / "a run", symlinks=True))


def edit_checkpoint(run: Path, **facts: Any) -> None:
    """Leave the optimizer's state out, and change what it says of its training."""
    path = (run / "checkpoints" / "last.ckpt").resolve()
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"optimizer_states": [], "sinktrain": checkpoint["sinktrain"] | facts}, path)


def count_parameters(model: GPTNeoX) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_card(source: Path, options: CardOptions | None = None) -> Card:
    """As ``export`` makes it, which then checks the model in transformers."""
    options, origin, model = options or CardOptions(), describe(source), load_model(source)
    known = (origin, model.config, count_parameters(model))
    compared = read_compared(options.results, *known) if options.results else None
    return model_card("out", known[1], known[2], origin, options, read_training(source), compared)


def results_with(run: Path, /, **changes: Any) -> dict[str, Any]:
    """A comparison whose ``vanilla`` is the model of a run."""
    results = losses_alone(example_results())
    results["models"][0] |= facts_of(run) | changes
    return results


def facts_of(run: Path) -> dict[str, Any]:
    """As ``models[]`` has them."""
    origin, model = describe(run), load_model(run)
    known = {key: getattr(origin, key) for key in ("tokens_seen", "seed", "arm")}
    return known | {"parameters": count_parameters(model), "sink": model.config.sink.to_dict()}


def losses_alone(results: dict[str, Any]) -> dict[str, Any]:
    """Less what a card does not show: checking all of it against the schema takes most of a test's time."""
    kept = ("models", "perplexity", "paired", "failed")
    return {
        name: [] if isinstance(rows, list) and name not in kept else rows for name, rows in results.items()
    }


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_of(markdown: str, header: str) -> dict[str, list[str]]:
    """The cells of the table whose first header is this, by the first of each row."""
    lines = markdown.split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {first: others for first, *others in rows}


def edit_yaml(path: Path, **changes: Any) -> None:
    value = yaml.safe_load(path.read_text())
    for name, new in changes.items():
        value[name] = {**value.get(name, {}), **new}
    path.write_text(yaml.safe_dump(value))


# -- metadata ---------------------------------------------------------------------------------------


def test_metadata_is_what_huggingface_hub_reads_and_writes(run: Path, tmp_path: Path) -> None:
    results = results_with(run)
    options = CardOptions("lab/Tiny-Vanilla", "Apache-2.0", write_results(tmp_path / "compare", results))
    text = make_card(run, options).text
    card = ModelCard(text)
    assert str(card) == text
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md") == card.data.to_dict()
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "Tiny-Vanilla"
    assert "language" not in card.data.to_dict()
    measured = {result.metric_name: result for result in card.data.eval_results}
    rows = [row for row in results["perplexity"] if (row["model"], row["policy"]) == ("vanilla", "streaming")]
    assert len(measured) == len(rows) == len(card.data.eval_results) > 0
    for row in rows:
        found = measured[f"perplexity, {row['sinks']}+{row['window']}"]
        assert isinstance(found, EvalResult)
        assert found.metric_value == row["perplexity"]
        assert found.metric_args["loss_ci95_nats"] == row["ci95"]
        assert (found.task_type, found.dataset_name) == ("text-generation", "book.txt")


def test_metadata_of_several_texts_keeps_them_apart(run: Path, tmp_path: Path) -> None:
    results = losses_alone(example_results(texts=("a book.txt", "code.jsonl")))
    results["models"][0] |= facts_of(run)
    card = ModelCard(make_card(run, CardOptions(results=write_results(tmp_path / "two", results))).text)
    assert {result.dataset_name for result in card.data.eval_results} == {"a book.txt", "code.jsonl"}
    assert len({result.dataset_type for result in card.data.eval_results}) == 2


def test_without_results_and_licence_neither_is_claimed(run: Path) -> None:
    text = make_card(run).text
    assert ModelCard(text).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert section(text, "Licence").strip() == "Not stated: ask whoever published it."
    assert "## Streaming\n" not in text


@pytest.mark.parametrize(
    ("typed", "stands"), [("MIT", "mit"), ("CC-BY-4.0", "cc-by-4.0"), ("other", "other")]
)
def test_licence_is_spelt_as_the_hub_does(typed: str, stands: str) -> None:
    assert licence_id(typed) == stands


@pytest.mark.parametrize("typed", ["mit\nbase_model: x", "the usual", "./LICENSE", ""])
def test_licence_that_is_none_is_refused(run: Path, tmp_path: Path, typed: str) -> None:
    message = r'--license ".*" is no SPDX id; use one such as apache-2.0, mit or cc-by-4.0'
    with pytest.raises(ExportError, match=re.compile(message, re.DOTALL)):
        export(run, tmp_path / "out", CardOptions(licence=typed))
    assert not (tmp_path / "out").exists()


# -- training ---------------------------------------------------------------------------------------


def test_card_of_a_run_tells_its_training(run: Path, shards: Path) -> None:
    text = make_card(run).text
    facts = table_of(section(text, "Training"), "training")
    manifest = json.loads((run / "manifest.json").read_text())
    assert facts["data fingerprint"] == [f"`{manifest['identity']['data_fingerprint']}`"]
    assert facts["tokens in it"] == ["3,000 in 1 documents, and 500 held out"]
    assert facts["passes over it"] == [f"{12 * 8 * 32 / 3000:.2f}"]
    assert facts["batch"] == ["8 samples of 32 tokens: 256 tokens a step"]
    assert facts["steps"] == ["12"]
    assert facts["learning rate"] == ["0.01 at its peak, then cosine to 10% of it; warm-up of 2 steps"]
    assert facts["optimizer"] == [
        "AdamW; betas 0.9 and 0.95, eps 1e-08, weight decay 0.1, gradients clipped to 1"
    ]
    assert facts["precision"] == ["float32"]
    assert facts["held-out loss"] == [f"{manifest['val_loss_nats']:.4f} nats"]
    per_token = 6 * (2 * 12 * 32**2 + 384 * 32) + 12 * 2 * 32 * 32  # two layers, width 32, samples of 32
    assert load_model(run).config.vocab_size == 384
    assert facts["FLOPs"][0].startswith(f"{12 * 8 * 32 * per_token:.2g}: ")
    assert table_of(section(text, "Facts"), "fact")["tokens seen"] == [f"{12 * 8 * 32:,}"]
    assert "started from" not in facts
    edit_json(run / "manifest.json", remove=("hardware",))
    assert "| hardware |" not in make_card(run).text


def test_settings_of_the_card_are_a_config_that_makes_the_same_run(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    from sinktrain.training.settings import TrainingCLI

    settings = make_card(run).text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "card.yaml").write_text(settings)
    typed = [
        "--config",
        str(tmp_path / "card.yaml"),
        "--data.path",
        str(shards),
        "--run",
        str(tmp_path / "b"),
    ]
    identity = json.loads((run / "manifest.json").read_text())["identity"]
    cli = TrainingCLI(typed)
    assert json.loads(json.dumps(cli.identity())) == identity
    before = yaml.safe_load((run / "config.yaml").read_text())
    after = yaml.safe_load(cli.dump())
    assert after["model"] == before["model"]
    assert after["trainer"]["max_steps"] == before["trainer"]["max_steps"]


def test_hardware_and_the_wandb_run_are_told_where_the_run_recorded_them(run: Path) -> None:
    alone = {"device": "cpu", "num_devices": 1, "train_seconds": 90.0}
    edit_json(run / "manifest.json", hardware=alone)
    assert "| hardware | CPU; its steps took 1.5 minutes |" in make_card(run).text
    hardware = {"device": "NVIDIA H100 80GB HBM3", "num_devices": 8, "train_seconds": 9000.0}
    url = "https://wandb.ai/lab/sinktrain/runs/c8fd40230122"
    edit_json(run / "manifest.json", hardware=hardware, wandb_url=url)
    facts = table_of(section(make_card(run).text, "Training"), "training")
    assert facts["hardware"] == ["8 x NVIDIA H100 80GB HBM3; its steps took 2.5 hours, 20.0 device-hours"]
    assert facts["run"] == [f"[Weights & Biases]({url})"]


def test_an_earlier_checkpoint_of_a_run_has_its_own_step_and_not_the_loss_of_the_last(run: Path) -> None:
    from sinktrain.training.saving import name_last

    last = (run / "checkpoints" / "last.ckpt").resolve()
    edit_json(run / "manifest.json", tokens_seen=99_999, val_loss_nats=1.5)
    earlier = last.rename(last.with_name("step-00000008.ckpt"))
    name_last(earlier)
    for source in (run, earlier):
        facts = table_of(section(make_card(source).text, "Training"), "training")
        assert facts["steps"] == ["8 of 12"]
        assert "held-out loss" not in facts


def test_a_hub_model_that_training_started_from_is_the_base_and_a_local_one_is_not_named(run: Path) -> None:
    identity = json.loads((run / "manifest.json").read_text())["identity"]
    edit_json(run / "manifest.json", identity=identity | {"init_from": "EleutherAI/pythia-14m"})
    text = make_card(run).text
    assert ModelCard(text).data.base_model == "EleutherAI/pythia-14m"
    assert "[EleutherAI/pythia-14m](https://huggingface.co/EleutherAI/pythia-14m)" in text
    edit_json(run / "manifest.json", identity=identity | {"init_from": "runs/alice"})
    text = make_card(run).text
    assert ModelCard(text).data.base_model is None
    assert "| started from | the weights of another model |" in text
    assert "alice" not in text


def test_a_hub_dataset_is_named_and_a_local_text_by_its_last_name(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    there = Path(shutil.copytree(shards, tmp_path / "copied"))
    edit_yaml(run / "config.yaml", data={"path": str(there)})
    edit_json(there / "manifest.json", source={"location": "/home/alice/books", "files": ["a.txt"]})
    text = make_card(run).text
    assert "| text | `books` |" in text
    assert "alice" not in text
    edit_json(there / "manifest.json", source={"location": "lab/books", "subset": "en", "split": "train"})
    text = make_card(run).text
    assert ModelCard(text).data.datasets == ["lab/books"]
    assert "| text | [lab/books](https://huggingface.co/datasets/lab/books) |" in text


def test_shards_that_are_gone_or_others_now_leave_the_fingerprint_alone(run: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "others", seed=1)
    for path in (tmp_path / "nowhere", tmp_path / "others"):
        edit_yaml(run / "config.yaml", data={"path": str(path)})
        facts = table_of(section(make_card(run).text, "Training"), "training")
        assert "text" not in facts
        assert "data fingerprint" in facts


@pytest.mark.parametrize("damage", ["{", "[1]", "", "- a: [\n"])
def test_damaged_files_of_a_run_tell_nothing_and_stop_nothing(run: Path, damage: str) -> None:
    (run / "config.yaml").write_text(damage)
    text = make_card(run).text
    assert "<details><summary>Settings" not in text
    assert "data fingerprint" in text
    (run / "manifest.json").write_text(damage)
    assert "data fingerprint" in make_card(run).text


def test_a_checkpoint_outside_a_run_has_a_short_card(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copyfile(run / "checkpoints" / "last.ckpt", tmp_path / "model.ckpt"))
    text = make_card(alone).text
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["Sink", "Use", "Facts", "Training", "Limitations", "Licence", "Citation"]
    assert list(table_of(section(text, "Training"), "training")) == [
        "data fingerprint",
        "sinktrain that trained it",
    ]
    assert "None" not in text


def test_a_model_of_which_nothing_is_known_has_no_training_section(tmp_path: Path) -> None:
    folder = export(write_run(tiny_model(), tmp_path / "run"), tmp_path / "once").folder
    edit_json(folder / "config.json", remove=("sinktrain",))
    text = make_card(folder).text
    assert "## Training" not in text
    assert "small model: it continues text" in text
    assert "None" not in text


def test_facts_of_a_folder_that_are_no_facts_are_left_out(tmp_path: Path) -> None:
    folder = export(write_run(tiny_model(), tmp_path / "run"), tmp_path / "once").folder
    facts = {"code_version": "1.0 | [x](http://x)", "data_fingerprint": "/home/alice", "run_id": 7}
    edit_json(folder / "config.json", sinktrain=facts)
    assert read_training(folder).facts == {}
    edit_json(folder / "config.json", sinktrain="what")
    assert read_training(folder).facts == {}


# -- measurements -----------------------------------------------------------------------------------


def test_table_shows_the_numbers_of_the_results(run: Path, tmp_path: Path) -> None:
    results = results_with(run)
    text = make_card(run, CardOptions(results=write_results(tmp_path / "compare", results))).text
    cells = table_of(text, "layout")
    assert "| layout | vanilla | sink |" in text
    rows = {(row["model"], layout_name(row)): row for row in results["perplexity"]}
    assert set(cells) == {layout for _, layout in rows}
    for layout, shown in cells.items():
        of_both = [rows["vanilla", layout], rows["sink", layout]]
        assert shown == [
            f"{perplexity_text(row['perplexity'])} ({loss_interval_text(row)})" for row in of_both
        ]
    differences = section(text, "Streaming").split("| difference |")[1]
    assert "sink - vanilla" in differences
    assert "\n| sink | " not in differences  # of another model alone
    assert "As each is usually streamed (sink 1+63, vanilla 4+60), sink is better than vanilla by" in text
    assert "which of two models ends up better can flip with it" in section(text, "Limitations")


def test_a_file_of_results_is_as_good_as_its_folder(run: Path, tmp_path: Path) -> None:
    folder = write_results(tmp_path / "compare", results_with(run))
    of_folder = make_card(run, CardOptions(results=folder))
    assert make_card(run, CardOptions(results=folder / "results.json")) == of_folder


def test_many_models_are_cut_to_this_one_and_those_that_tell_most(run: Path, tmp_path: Path) -> None:
    results = losses_alone(example_results(seeds=True, arms=("sink", "vanilla", "zero")))
    [mine] = [model for model in results["models"] if model["name"] == "vanilla-seed2"]
    mine |= {key: value for key, value in facts_of(run).items() if key not in ("arm", "seed")}
    edit_checkpoint(run, seed=2)
    text = make_card(run, CardOptions(results=write_results(tmp_path / "seeds", results))).text
    assert "This model is **vanilla-seed2** here." in text
    assert "| layout | vanilla-seed2 | vanilla-seed1 | vanilla-seed3 | sink-seed1 |" in text
    assert "5 more models were compared." in text
    assert "\n| vanilla - sink | 1+63 |" in text  # over the seeds of its arm


def test_tokenizers_that_differ_are_compared_in_bits(run: Path, tmp_path: Path) -> None:
    results = results_with(run, tokenizer="cd" * 32)
    results["paired"] = [pair for pair in results["paired"] if pair["a"] == pair["b"]]
    text = make_card(run, CardOptions(results=write_results(tmp_path / "compare", results))).text
    assert "Bits per byte, as the models' tokenizers differ" in text
    row = next(row for row in results["perplexity"] if row["sinks"] == 4 and row["window"] == 60)
    assert f"{row['bits_per_byte']:.4f}" in text


def test_comparison_beside_the_card_is_linked_and_else_not(run: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / "compare", results_with(run))
    for has_folder in (True, False):
        text = make_card(run, CardOptions(results=results, comparison=has_folder)).text
        assert ("[report.html](comparison/report.html)" in text) == has_folder


def test_results_of_other_models_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    folder = write_results(tmp_path / "compare", results_with(run, tokens_seen=5))
    message = (
        r"--results .*compare does not hold .*a run \(vanilla, seed 1234, 3,072 tokens\); it holds vanilla: "
        r"vanilla, seed 1234, 5 tokens, sink: sink, seed 1, 3,276,800 tokens; name a comparison of this very "
        "checkpoint, or leave --results out"
    )
    with pytest.raises(ExportError, match=message) as caught:
        export(run, tmp_path / "out", CardOptions(results=folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_results_with_two_models_alike_need_its_name(run: Path, tmp_path: Path) -> None:
    results = results_with(run)
    results["models"][1] |= {key: value for key, value in results["models"][0].items() if key != "name"}
    folder = write_results(tmp_path / "compare", results)
    with pytest.raises(ExportError, match=r"holds several models like .*a run"):
        make_card(run, CardOptions(results=folder))
    named = run.rename(run.with_name("sink"))
    assert "This model is **sink** here." in make_card(named, CardOptions(results=folder)).text


def test_a_model_of_unknown_training_is_known_by_name_alone(tmp_path: Path) -> None:
    folder = export(write_run(tiny_model(), tmp_path / "run"), tmp_path / "theirs").folder
    edit_json(folder / "config.json", remove=("sinktrain",))
    results = results_with(folder)
    with pytest.raises(ExportError, match=r"does not hold .*theirs \(sink none\)"):
        make_card(folder, CardOptions(results=write_results(tmp_path / "compare", results)))
    for row in [*results["models"], *results["perplexity"], *results["paired"]]:
        row |= {key: "theirs" for key in ("name", "model", "a", "b") if row.get(key) == "vanilla"}
    made = make_card(folder, CardOptions(results=write_results(tmp_path / "compare", results)))
    assert "This model is **theirs** here." in made.text


def test_results_that_cannot_be_read_are_refused_as_compare_does(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.* cannot be read"):
        export(run, tmp_path / "out", CardOptions(results=tmp_path / "nowhere"))


# -- picture ----------------------------------------------------------------------------------------


def test_picture_shows_the_numbers_of_the_results() -> None:
    results = example_results(texts=("book.txt", "code.jsonl"), arms=("vanilla", "sink", "zero", "gate"))
    picture = streaming_picture(results)
    assert picture is not None
    root = ElementTree.fromstring(picture)
    svg = "{http://www.w3.org/2000/svg}"
    panels = [group for group in root.findall(f"{svg}g") if group.get("transform")]
    assert len(panels) == 2
    for panel, text in zip(panels, ("book.txt", "code.jsonl"), strict=True):
        rows = {
            (row["model"], layout_name(row)): row
            for row in results["perplexity"]
            if row["text"] == text and row["policy"] != "dense"
        }
        labels = [mark for mark in panel.findall(f"{svg}text") if mark.get("class") == "tick"]
        (x0, first), *_, (x1, last) = [(float(mark.attrib["x"]), float(mark.text or "")) for mark in labels]
        assert len(labels) > 3

        def loss_at(x: str, x0: float = x0, first: float = first, step: float = (last - first) / (x1 - x0)):
            return first + (float(x) - x0) * step

        pixel = (last - first) / (x1 - x0)
        marks = [mark for mark in panel.iter(f"{svg}g") if mark.get("class") == "mark"]
        assert {(mark.get("data-model"), mark.get("data-layout")) for mark in marks} == set(rows)
        for mark in marks:
            row = rows[mark.attrib["data-model"], mark.attrib["data-layout"]]
            assert abs(loss_at(mark.attrib["data-x"]) - row["loss_nats"]) < 0.05 * pixel
            assert all(circle.get("cx") == mark.get("data-x") for circle in mark.findall(f"{svg}circle"))
            [whisker] = [path for path in mark.findall(f"{svg}path") if path.get("class") == "interval"]
            low, high = re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.attrib["d"]).groups()
            assert abs(loss_at(low) - row["ci95"][0]) < 0.05 * pixel
            assert abs(loss_at(high) - row["ci95"][1]) < 0.05 * pixel
            assert LEFT <= float(low) < float(mark.attrib["data-x"]) < float(high) <= WIDTH - RIGHT


def test_picture_keeps_marks_of_models_apart_and_in_the_row_of_their_layout() -> None:
    results = example_results(arms=("vanilla", "sink", "zero", "gate"))
    root = ElementTree.fromstring(streaming_picture(results) or "")
    tops: dict[str, list[float]] = {}
    for path in root.iter("{http://www.w3.org/2000/svg}g"):
        if path.get("class") == "mark":
            y = float(path[1].attrib["d"].split("H")[0].split()[1])
            tops.setdefault(path.attrib["data-layout"], []).append(y)
    assert all(abs(a - b) >= 12 for some in tops.values() for a, b in combinations(some, 2))
    spans = [(min(some), max(some)) for some in tops.values()]
    assert all(one[1] < other[0] for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False))


def test_picture_of_hostile_names_is_still_xml_without_scripts() -> None:
    results = example_results(texts=("<script>alert(1)</script>&\"'",))
    picture = streaming_picture(results) or ""
    ElementTree.fromstring(picture)
    assert "<script" not in picture


def test_without_rows_there_is_no_picture() -> None:
    assert streaming_picture({**example_results(), "perplexity": []}) is None


@pytest.mark.parametrize(("low", "high"), [(4.1, 5.8), (0.0, 1.0), (3.2999, 3.3001), (2.0, 400.0)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 4 <= len(found) <= 11
    assert all(math.isclose(float(label), value) for value, label in found)
    assert low <= float(found[0][1]) < float(found[-1][1]) <= high


# -- what must not be told --------------------------------------------------------------------------


def test_no_path_no_secret_and_no_text_gets_into_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, home, user, host, text = SECRETS
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", token)
    logger = {"class_path": "WandbLogger", "init_args": {"save_dir": home, "api_key": token, "entity": user}}
    strategy = {"class_path": "ddp", "init_args": {"cluster": host}}
    edit_yaml(
        run / "config.yaml",
        trainer={"logger": logger, "default_root_dir": home, "strategy": strategy, "precision": token},
        model={"schedule": f"{home}/schedule", "optimizer": token, "compile": text, "notes": text},
        data={"sample": text},
        environment={"HF_TOKEN": token},
        checkpoint={"folder": home},
    )
    manifest = json.loads((run / "manifest.json").read_text())
    edit_json(
        run / "manifest.json",
        identity=manifest["identity"] | {"init_from": f"{home}/models/base"},
        hardware={"device": f"{home}/dev", "num_devices": host, "train_seconds": text},
        wandb_url=f"https://{user}:{token}@wandb.ai/x",
        resumed_from=f"{home}/other/last.ckpt",
        host=host,
        sample=text,
    )
    results = results_with(run, source=f"{home}/runs/vanilla")
    rename(results, {"vanilla": f"{home}/runs/vanilla", "book.txt": f"{home}/book.txt"})
    results["failed"] = [{"model": f"{home}/runs/half", "error": f"OSError: {home}: {host}"}]
    results["environment"] |= {
        "host": host,
        "command": f"sinktrain compare {home}/runs/vanilla {home}/runs/sink --text {home}/book.txt "
        f"--out {home}/o --layouts 32,64 --tokenizer={home} --wandb {token} --max-tokens=4000",
    }
    options = CardOptions("lab/tiny", "mit", write_results(tmp_path / "compare", results), True)
    folder = export(run, tmp_path / "out", options).folder
    written = {path.name: path.read_bytes().decode("utf-8", "replace") for path in folder.iterdir()}
    assert {"README.md", PICTURE_FILE, "config.json", "model.safetensors"} <= set(written)
    for name, content in {**written, "results without paths": json.dumps(without_paths(results))}.items():
        for secret in (*SECRETS, str(tmp_path)):
            assert secret not in content, (name, secret)
    expected = "sinktrain compare vanilla sink --text book.txt --layouts 32,64 --max-tokens 4000 --out DIR"
    assert f"```\n{expected}\n```" in written["README.md"]
    assert "half could not be measured" in written["README.md"]


def rename(results: dict[str, Any], names: dict[str, str]) -> None:
    for rows in results.values():
        for row in rows if isinstance(rows, list) else []:
            for key in ("name", "model", "a", "b", "text"):
                if row.get(key) in names:
                    row[key] = names[row[key]]


def test_models_called_alike_by_their_last_names_stay_apart() -> None:
    results = example_results(arms=("vanilla", "sink", "zero"))
    rename(
        results, {"vanilla": "/home/alice/sink", "sink": "/home/bob/sink", "zero": "EleutherAI/pythia-14m"}
    )
    names = [model["name"] for model in without_paths(results)["models"]]
    assert names == ["sink", "sink (2)", "EleutherAI/pythia-14m"]
    public = without_paths(results)
    assert {row["model"] for row in public["perplexity"]} == set(names)
    assert {row["text"] for row in public["paired"]} == {"book.txt"}
    assert Compared(public, public["models"][1]).rows[0]["loss_nats"] == next(
        row["loss_nats"] for row in results["perplexity"] if row["model"] == "/home/bob/sink"
    )


def test_names_in_results_are_shown_as_they_stand_and_never_as_markup(run: Path, tmp_path: Path) -> None:
    results = results_with(run)
    rename(results, {"sink": "<b>|`x`*[y](z)", "book.txt": "<img src=x>"})
    text = make_card(run, CardOptions(results=write_results(tmp_path / "compare", results))).text
    html = rendered(text)
    assert "<img src=x>" not in html
    assert "<b>" not in html


# -- as a whole -------------------------------------------------------------------------------------


def test_the_same_model_run_and_results_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    options = CardOptions("lab/tiny", "mit", write_results(tmp_path / "compare", results_with(run)))
    first = export(run, tmp_path / "first", options).folder
    second = make_card(run, options)
    assert (first / "README.md").read_bytes() == second.text.encode()
    assert (first / PICTURE_FILE).read_text() == second.picture
    config = json.loads((first / "config.json").read_text())["sinktrain"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert config["run_id"] == manifest["run_id"]
    assert config["data_fingerprint"] == manifest["identity"]["data_fingerprint"]
    assert read_training(first).facts == read_training(run).facts


def test_code_of_the_card_loads_the_repository_by_its_name(run: Path, tmp_path: Path) -> None:
    text = make_card(run, CardOptions("lab/tiny")).text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "card", "exec")
        assert '"lab/tiny"' in block
    assert "\nsinktrain stream lab/tiny --prompt" in text
    assert "\n# tiny\n" in text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_code_of_the_card_names_the_branch_that_the_model_is_on(kind: str, tmp_path: Path) -> None:
    count = int(KINDS[kind].has_tokens)
    sink = SinkConfig(kind, count, tuple(range(90, 90 + count)))
    run = write_run(tiny_model(sink=sink), tmp_path / "run")
    plain, branch = (
        make_card(run, CardOptions("lab/x", revision=revision)).text for revision in (None, "step4")
    )
    assert "step4" not in plain
    assert branch.replace('"lab/x", revision="step4"', '"lab/x"').replace("lab/x@step4", "lab/x") == plain
    for block in re.findall(r"```python\n(.*?)```", branch, re.DOTALL):
        compile(block, "card", "exec")
        assert block.count('"lab/x"') == block.count('"lab/x", revision="step4"') > 0


def test_card_renders_as_tables_and_code(run: Path, tmp_path: Path) -> None:
    options = CardOptions("lab/tiny", "mit", write_results(tmp_path / "compare", results_with(run)), True)
    html = rendered(make_card(run, options).text)
    assert html.count("<table>") == 4
    assert html.count("<details>") == html.count("</details>") == 2
    assert html.count("<h2>") == 8
    assert f'<img src="{PICTURE_FILE}"' in html
    assert not re.search(r"<p>[^<]*(\|.*\||```|\*\*|^#)", html)


def rendered(card: str) -> str:
    """HTML as GitHub and the Hub make it."""
    markdown = pytest.importorskip("markdown_it")
    html: str = markdown.MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])
    return html
