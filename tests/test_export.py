"""An export is what plain transformers, of either generation, reads as our model and our tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import FACTS, edit_json, random_tokens, tiny_model, write_run

from sinktrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from sinktrain.errors import ExportError
from sinktrain.model.checkpoints import describe, load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.publishing import export as export_module
from sinktrain.publishing.export import Exported, export

TEXT = "The quick brown fox jumps over the lazy dog."
TRAINED_LENGTH = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT * 5]), 280)


def model_with(tokenizer: Tokenizer, num_sinks: int, **changes: Any) -> GPTNeoX:
    ids = tokenizer.sink_token_ids[:num_sinks]
    sink = SinkConfig("token", num_sinks, ids) if num_sinks else SinkConfig()
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "max_position_embeddings": TRAINED_LENGTH}
    return tiny_model(sink=sink, **sizes | changes)


def write_run_with_tokenizer(model: GPTNeoX, tokenizer: Tokenizer, folder: Path) -> Path:
    write_run(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["vanilla", "one sink", "two sinks"])
def exported(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPTNeoX, Path]:
    """A model and its export; their rotary shares differ too."""
    folder = tmp_path_factory.mktemp("export")
    model = model_with(tokenizer, request.param, rotary_pct=[0.25, 1.0, 0.5][request.param])
    run = write_run_with_tokenizer(model, tokenizer, folder / "run")
    result = export(run, folder / "new" / "out")
    assert result == Exported(folder / "new" / "out", result.max_logit_diff, has_tokenizer=True)
    assert 0 < result.max_logit_diff < 1e-5
    return model, result.folder


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_transformers_gives_our_logits(exported: tuple[GPTNeoX, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model, folder = exported
    theirs, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert theirs.dtype == torch.float32
    tokens = random_tokens(model.config.vocab_size, seq=100)
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-5


def test_export_loads_as_the_model_it_came_from(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert describe(folder).tokens_seen == FACTS["tokens_seen"]
    assert (describe(folder).seed, describe(folder).arm) == (FACTS["seed"], FACTS["arm"])


def test_export_of_an_export_is_the_same(exported: tuple[GPTNeoX, Path], tmp_path: Path) -> None:
    _, folder = exported
    export(folder, tmp_path / folder.name)
    for path in folder.iterdir():
        assert (tmp_path / folder.name / path.name).read_bytes() == path.read_bytes(), path.name


def test_config_has_the_rotary_settings_in_both_forms(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    config, network = read_json(folder / "config.json"), model.config.network
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == network.rotary_pct
    assert config["rotary_emb_base"] == config["rope_parameters"]["rope_theta"] == network.rotary_emb_base
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_config_tells_the_sink_and_every_special_id(
    exported: tuple[GPTNeoX, Path], tokenizer: Tokenizer
) -> None:
    model, folder = exported
    config = read_json(folder / "config.json")
    assert config["sink"] == {
        "kind": model.config.sink.kind,
        "count": len(model.sink_ids),
        "token_ids": model.sink_ids,
    }
    assert config["bos_token_id"] == (model.sink_ids[-1] if model.sink_ids else None)
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_token_id
    assert config["max_position_embeddings"] == TRAINED_LENGTH
    assert config["tie_word_embeddings"] is False


def test_sinks_stand_in_front_exactly_once(exported: tuple[GPTNeoX, Path], tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    model, folder = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    sinks, ids = model.sink_ids, tokenizer.encode(TEXT)
    assert theirs(TEXT).input_ids == sinks + ids
    assert theirs.encode(TEXT) == sinks + ids
    assert theirs(TEXT, TEXT).input_ids == sinks + ids + ids
    assert theirs(TEXT, add_special_tokens=False).input_ids == ids
    assert theirs(["The", TEXT], padding=True).input_ids[0][-len(sinks) - len(tokenizer.encode("The")) :] == (
        sinks + tokenizer.encode("The")
    )
    assert theirs.decode(sinks + ids, skip_special_tokens=True) == TEXT
    assert theirs.bos_token_id == (sinks[-1] if sinks else None)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eos_token_id
    assert theirs.model_max_length == TRAINED_LENGTH


def test_text_that_spells_a_sink_can_be_read_as_text(exported: tuple[GPTNeoX, Path]) -> None:
    from transformers import AutoTokenizer

    model, folder = exported
    theirs = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    ids = theirs("a <|sink|> b").input_ids
    assert [token for token in ids if token in model.sink_ids] == model.sink_ids


def test_exported_tokenizer_is_read_as_the_one_it_came_from(
    exported: tuple[GPTNeoX, Path], tokenizer: Tokenizer
) -> None:
    assert load_tokenizer(str(exported[1])).sha256 == tokenizer.sha256


def test_saved_again_by_transformers_the_tokenizer_still_prepends_once(
    exported: tuple[GPTNeoX, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model, folder = exported
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT).input_ids == model.sink_ids + tokenizer.encode(TEXT)


def eager_for_sinks(model: GPTNeoX, tokenizer: Tokenizer) -> GPTNeoX:
    """The same model, but rows without a text get the largest logits wherever it looks."""
    model.gpt_neox.final_layer_norm.bias[0] = 30.0
    model.embed_out.weight[tokenizer.vocab_size :, 0] = 9.0
    return model


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_pipeline_starts_with_the_sinks_and_never_emits_one(
    tmp_path: Path, tokenizer: Tokenizer, num_sinks: int
) -> None:
    from transformers import pipeline

    model = eager_for_sinks(model_with(tokenizer, num_sinks), tokenizer)
    folder = export(write_run_with_tokenizer(model, tokenizer, tmp_path / "run"), tmp_path / "out").folder
    prompt = model.sink_ids + tokenizer.encode(TEXT)
    assert model(torch.tensor([prompt])).argmax(-1).min() >= tokenizer.vocab_size
    generate = pipeline("text-generation", model=str(folder))
    for do_sample in (False, True):
        options = {"max_new_tokens": 12, "do_sample": do_sample, "return_tensors": True}
        ids = generate(TEXT, **options)[0]["generated_token_ids"]
        assert ids[: len(prompt)] == prompt
        assert len(ids) > len(prompt)
        assert max(ids[len(prompt) :]) < tokenizer.vocab_size
    assert "<|sink" not in generate(TEXT, max_new_tokens=4)[0]["generated_text"]


def test_padded_batch_generates_what_each_text_does_alone(
    exported: tuple[GPTNeoX, Path], tokenizer: Tokenizer
) -> None:
    """Left padding hides behind the mask, so the sink stays the first token that is seen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = exported
    model, encode = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["The", TEXT]

    def continue_(texts: list[str]) -> torch.Tensor:
        inputs = encode(texts, padding=True, return_tensors="pt")
        tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return tokens[:, -8:]

    assert torch.equal(continue_(texts), torch.cat([continue_([text]) for text in texts]))


def test_model_without_a_tokenizer_is_exported_without_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = model_with(tokenizer, 2)
    result = export(write_run(model, tmp_path / "run"), tmp_path / "out")
    assert not result.has_tokenizer
    files = {path.name for path in result.folder.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    config = read_json(result.folder / "config.json")
    assert config["eos_token_id"] is config["pad_token_id"] is None
    assert read_json(result.folder / "generation_config.json")["suppress_tokens"] == model.sink_ids


def test_old_float16_folder_of_others_is_exported_in_full(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As Pythia stands on the Hub: float16, rotary_pct at the top, the vocabulary's padding unnamed."""
    model = model_with(tokenizer, 0, rotary_pct=0.5)
    theirs = export(write_run_with_tokenizer(model, tokenizer, tmp_path / "run"), tmp_path / "old").folder
    edit_json(theirs / "config.json", remove=("rope_parameters", "sink", "sinktrain", "dtype"))
    from safetensors.torch import save_file

    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    save_file(weights, theirs / "model.safetensors")
    result = export(theirs, tmp_path / "out")
    assert load_model(result.folder).config == model.config
    assert load_model(result.folder).embed_out.weight.equal(weights["embed_out.weight"].float())


def test_files_are_as_readable_as_others(exported: tuple[GPTNeoX, Path]) -> None:
    modes = {path.name: path.stat().st_mode for path in exported[1].iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_card_has_metadata_and_tells_only_what_is_known(
    exported: tuple[GPTNeoX, Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model, folder = exported
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert ("attention-sink" in metadata["tags"]) == bool(model.sink_ids)
    assert "license" not in metadata
    assert "| tokens seen | 6,400 |" in card
    assert f"sinktrain stream {folder.name}" in card
    assert all(str(sink) in card for sink in model.sink_ids)


def test_card_leaves_out_what_a_checkpoint_does_not_say(tmp_path: Path) -> None:
    folder = export(write_run(tiny_model(), tmp_path / "run"), tmp_path / "once").folder
    edit_json(folder / "config.json", remove=("sinktrain",))
    card = (export(folder, tmp_path / "twice").folder / "README.md").read_text()
    assert "| tokens seen |" not in card
    assert "None" not in card.split("## Facts")[1]


def test_export_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(write_run(tiny_model(), tmp_path / "run"), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def list_tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def refuse(run: Path, out: Path, message: str) -> None:
    """Export must fail with one such line and leave every folder as it was."""
    before = list_tree(run.parent)
    with pytest.raises(ExportError, match=message) as caught:
        export(run, out)
    assert "\n" not in str(caught.value)
    assert list_tree(run.parent) == before


def test_taken_folder_is_left_alone(tmp_path: Path) -> None:
    run, out = write_run(tiny_model(), tmp_path / "run"), tmp_path / "out"
    export(run, out)
    refuse(run, out, r"out is there already and stays as it is; name a new folder or remove that one")
    refuse(run, out / "README.md", r"README.md is there already")
    refuse(run, run, r"run is there already")


def test_empty_folder_may_be_filled(tmp_path: Path) -> None:
    run, out = write_run(tiny_model(), tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    assert (export(run, out).folder / "config.json").is_file()


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    run = write_run(tiny_model(), tmp_path / "run")
    (tmp_path / "file").touch()
    refuse(run, tmp_path / "file" / "out", r"out cannot be written: Not a directory; name another folder")


@pytest.mark.parametrize("broken", ["rotary", "weights", "not a number"])
def test_export_with_other_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model = tiny_model(rotary_pct=1.0)
    if broken == "not a number":
        model.embed_out.weight[3, 3] = torch.nan
    run = write_run(model, tmp_path / "run")
    written: Callable[..., None] = export_module._write_model

    def spoil(folder: Path, model: GPTNeoX, *others: Any) -> None:
        if broken == "weights":
            model = tiny_model(rotary_pct=1.0, seed=1)
        written(folder, model, *others)
        if broken == "rotary":
            edit_json(folder / "config.json", remove=("rope_parameters",), rotary_pct=0.5)

    monkeypatch.setattr(export_module, "_write_model", spoil)
    refuse(
        run, tmp_path / "new" / "out", r"logits differ from ours by .*, more than 0.0001; nothing was written"
    )


def test_export_with_other_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    run = write_run_with_tokenizer(model_with(tokenizer, 1), tokenizer, tmp_path / "run")
    with_sinks = Tokenizer.with_sinks
    monkeypatch.setattr(Tokenizer, "with_sinks", lambda self, count: with_sinks(self, count + 1))
    refuse(run, tmp_path / "out", r"transformers' tokens differ from ours: .*; nothing was written")


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    small = write_run_with_tokenizer(tiny_model(), tokenizer, tmp_path / "small")
    refuse(small, tmp_path / "out", r"small has a tokenizer of \d+ ids but 97 rows for them; put there the")
    model = tiny_model(sink=SinkConfig("token", 1, (300,)), vocab_size=tokenizer.padded_vocab_size)
    moved = write_run_with_tokenizer(model, tokenizer, tmp_path / "moved")
    refuse(moved, tmp_path / "out", r"moved has the sinks \[300\] but its tokenizer keeps \[\d+\] for them")


IN_TRANSFORMERS_4 = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
assert transformers.__version__.startswith("4.57."), transformers.__version__
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}.pt")
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        difference = (model(expected["tokens"]).logits - expected["logits"]).abs().max().item()
        scale = expected["logits"].abs().max().item()
    generated = pipeline("text-generation", model=folder)(
        expected["text"], max_new_tokens=12, min_new_tokens=12, return_tensors=True
    )[0]["generated_token_ids"]
    print(json.dumps({
        "transformers": transformers.__version__, "folder": folder, "difference": difference, "scale": scale,
        "problems": [value for value in loading.values() if value], "dtype": str(model.dtype),
        "same_ids": tokenizer(expected["text"]).input_ids == expected["ids"],
        "starts_with_sink": generated[: len(expected["ids"])] == expected["ids"],
        "largest_generated": max(generated[len(expected["ids"]) :]),
    }))
"""


@pytest.mark.slow
def test_transformers_4_gives_our_logits_and_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Installs 4.57 with its own tokenizers and huggingface_hub into a temporary folder: needs an index."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*install, "transformers==4.57.*"], check=True, capture_output=True)
    folders = []
    for num_sinks, rotary_pct in [(0, 1.0), (1, 0.25), (2, 0.5)]:
        model = eager_for_sinks(model_with(tokenizer, num_sinks, rotary_pct=rotary_pct), tokenizer)
        run = write_run_with_tokenizer(model, tokenizer, tmp_path / f"run{num_sinks}")
        folder = export(run, tmp_path / f"out{num_sinks}").folder
        tokens = random_tokens(model.config.vocab_size, seq=100)
        ids = model.sink_ids + tokenizer.encode(TEXT)
        torch.save({"tokens": tokens, "logits": model(tokens), "text": TEXT, "ids": ids}, f"{folder}.pt")
        folders.append(str(folder))
    run_there = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS_4, *folders],
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
    )
    assert run_there.returncode == 0, run_there.stderr
    print(run_there.stdout)
    for line in run_there.stdout.splitlines():
        seen = json.loads(line)
        assert seen["difference"] < 1e-6 * seen["scale"], seen
        assert seen["problems"] == [], seen
        assert seen["same_ids"], seen
        assert seen["starts_with_sink"], seen
        assert seen["largest_generated"] < tokenizer.vocab_size, seen
        assert seen["dtype"] == "torch.float32", seen
    assert len(run_there.stdout.splitlines()) == len(folders)
