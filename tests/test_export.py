"""An export is what plain transformers, of either generation, reads as our model and our tokens."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import FACTS, edit_json, random_tokens, tiny_model, write_run

from sinktrain.cli import main
from sinktrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from sinktrain.errors import ExportError
from sinktrain.model.checkpoints import describe, load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.init import SINK_PART
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS, AttentionSink, Loading, NullSlot
from sinktrain.publishing import export as export_module
from sinktrain.publishing.card_use import PROMPT
from sinktrain.publishing.export import Exported, export
from sinktrain.publishing.prefix_cache import behind_sink, sink_cache

TEXT = "The quick brown fox jumps over the lazy dog."
TRAINED_LENGTH = 300
TWO_SINKS = "two sinks"
ALL = [*sorted(KINDS), TWO_SINKS]
BY_LOADING = {
    way: [kind for kind in sorted(KINDS) if KINDS[kind].loads_as == way] for way in get_args(Loading)
}
of_prefix_kinds = pytest.mark.parametrize("exported", BY_LOADING["prefix"], indirect=True)
of_code_kinds = pytest.mark.parametrize("exported", BY_LOADING["code"], indirect=True)
one_of_each_way = pytest.mark.parametrize(
    "exported", [TWO_SINKS, *(kind for kinds in BY_LOADING.values() for kind in kinds[:1])], indirect=True
)
ROTARY = dict(zip(ALL, (0.25, 1.0, 0.5) * len(ALL), strict=False))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT * 5]), 280)


@pytest.fixture(scope="module", autouse=True)
def _modules_of_trusted_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code that it is told to trust to the user's cache; here to another place."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        patch.setattr(sys, "path", [*sys.path])
        yield


def model_with(tokenizer: Tokenizer, sink: str = "none", **changes: Any) -> GPTNeoX:
    """A model with this kind of sink, or with two sink tokens."""
    kind, num_sinks = ("token", 2) if sink == TWO_SINKS else (sink, int(KINDS[sink].has_tokens))
    ids = tokenizer.sink_token_ids[:num_sinks]
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "max_position_embeddings": TRAINED_LENGTH}
    return tiny_model(sink=SinkConfig(kind, num_sinks, ids), **sizes | changes)


def write_run_with_tokenizer(model: GPTNeoX, tokenizer: Tokenizer, folder: Path) -> Path:
    write_run(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module", params=ALL)
def exported(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPTNeoX, Path]:
    """A model and its export; their rotary shares differ too."""
    folder = tmp_path_factory.mktemp("export")
    model = model_with(tokenizer, request.param, rotary_pct=ROTARY[request.param])
    run = write_run_with_tokenizer(model, tokenizer, folder / "run")
    result = export(run, folder / "new" / "out")
    loads_as = KINDS[model.config.sink.kind].loads_as
    assert result == Exported(folder / "new" / "out", loads_as, result.max_logit_diff, has_tokenizer=True)
    assert 0 < result.max_logit_diff < 1e-5
    return model, result.folder


class InTransformers:
    """An export as a user of transformers has it, by what its kind's ``loads_as`` says."""

    def __init__(self, folder: Path, model: GPTNeoX) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loads_as = KINDS[model.config.sink.kind].loads_as
        self.has_cache = loads_as == "prefix"
        trust: Any = {"trust_remote_code": loads_as == "code"}
        self.model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        assert not any(loading.values())

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(tokens, **self._cache(len(tokens))).logits
        return logits

    def continue_(self, texts: list[str], num_tokens: int) -> torch.Tensor:
        inputs = dict(self.tokenizer(texts, padding=True, return_tensors="pt"))
        if self.has_cache:
            inputs = behind_sink(inputs)
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        tokens: torch.Tensor = self.model.generate(**inputs, **self._cache(len(texts)), **options)
        return tokens[:, -num_tokens:]

    def _cache(self, batch_size: int) -> dict[str, Any]:
        return {"past_key_values": sink_cache(self.model, batch_size)} if self.has_cache else {}


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_transformers_gives_our_logits(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    theirs = InTransformers(folder, model)
    assert theirs.model.dtype == torch.float32
    for seq in (100, 1, 2):
        tokens = random_tokens(model.config.vocab_size, batch=3, seq=seq)
        assert (theirs.logits(tokens) - model(tokens)).abs().max() < 1e-5


def continued_by_us(model: GPTNeoX, tokenizer: Tokenizer, text: str, num_tokens: int) -> list[int]:
    """The sinks, the text and the likeliest tokens that may follow; its end may not."""
    tokens = model.sink_ids + tokenizer.encode(text)
    padding = range(tokenizer.vocab_size, model.config.vocab_size)
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens]))[0, -1]
        logits[[tokenizer.eos_token_id, *model.sink_ids, *padding]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def test_padded_batch_generates_what_our_model_does_for_each_text_alone(
    exported: tuple[GPTNeoX, Path], tokenizer: Tokenizer
) -> None:
    """Left padding hides behind the mask, so the sink stays the first that is seen."""
    model, folder = exported
    ours = [continued_by_us(model, tokenizer, text, 8)[-8:] for text in ("The", TEXT)]
    assert InTransformers(folder, model).continue_(["The", TEXT], 8).tolist() == ours


def test_export_loads_as_the_model_it_came_from(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    loaded, tokens = load_model(folder), random_tokens(model.config.vocab_size)
    assert loaded.config == model.config
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(loaded(tokens), model(tokens))
    assert describe(folder).tokens_seen == FACTS["tokens_seen"]
    assert (describe(folder).seed, describe(folder).arm) == (FACTS["seed"], FACTS["arm"])


@one_of_each_way
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
    model, folder = exported
    theirs = InTransformers(folder, model).tokenizer
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
    theirs = AutoTokenizer.from_pretrained(folder, split_special_tokens=True, trust_remote_code=False)
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
    InTransformers(folder, model).tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT).input_ids == model.sink_ids + tokenizer.encode(TEXT)


def eager_for_sinks(model: GPTNeoX, tokenizer: Tokenizer) -> GPTNeoX:
    """The same model, but rows without a text get the largest logits wherever it looks."""
    model.gpt_neox.final_layer_norm.bias[0] = 30.0
    model.embed_out.weight[tokenizer.vocab_size :, 0] = 9.0
    return model


@pytest.mark.parametrize("sink", [*BY_LOADING["plain"], *BY_LOADING["code"], TWO_SINKS])
def test_pipeline_starts_with_the_sinks_and_never_emits_one(
    tmp_path: Path, tokenizer: Tokenizer, sink: str
) -> None:
    from transformers import pipeline

    model = eager_for_sinks(model_with(tokenizer, sink), tokenizer)
    result = export(write_run_with_tokenizer(model, tokenizer, tmp_path / "run"), tmp_path / "out")
    prompt = model.sink_ids + tokenizer.encode(TEXT)
    assert model(torch.tensor([prompt])).argmax(-1).min() >= tokenizer.vocab_size
    generate = pipeline("text-generation", str(result.folder), trust_remote_code=result.loads_as == "code")
    for do_sample in (False, True):
        options = {"max_new_tokens": 12, "do_sample": do_sample, "return_tensors": True}
        ids = generate(TEXT, **options)[0]["generated_token_ids"]
        assert ids[: len(prompt)] == prompt
        assert len(ids) > len(prompt)
        assert max(ids[len(prompt) :]) < tokenizer.vocab_size
    assert "<|sink" not in generate(TEXT, max_new_tokens=4)[0]["generated_text"]


def code_of_card(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@one_of_each_way
def test_code_of_the_card_does_what_it_says(
    exported: tuple[GPTNeoX, Path],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a prefix cache its functions are those that every export is verified with."""
    model, folder = exported
    monkeypatch.chdir(folder.parent)
    space: dict[str, Any] = {}
    exec(code_of_card(folder), space)
    if KINDS[model.config.sink.kind].loads_as == "prefix":
        assert (space["logits"] - model(space["inputs"].input_ids)).abs().max() < 1e-5
        written = space["tokens"][0, 1:].tolist()
        written = written[:-1] if written[-1] == tokenizer.eos_token_id else written
        assert written == continued_by_us(model, tokenizer, PROMPT, 50)[: len(written)]


@of_prefix_kinds
def test_without_its_prefix_cache_it_is_another_model(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    theirs, tokens = InTransformers(folder, model).model, random_tokens(model.config.vocab_size)
    assert read_json(folder / "config.json")["model_type"] == "gpt_neox"
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() > 0.01
    assert "**Without that cache it is another model" in (folder / "README.md").read_text()


@of_prefix_kinds
def test_a_prefix_cache_is_one_slot_new_for_each_call_in_the_dtype_of_the_model(
    exported: tuple[GPTNeoX, Path],
) -> None:
    model, folder = exported
    theirs, tokens = InTransformers(folder, model), random_tokens(model.config.vocab_size)
    assert sink_cache(theirs.model).get_seq_length() == 1
    assert torch.equal(theirs.logits(tokens), theirs.logits(tokens))
    theirs.model.to(torch.bfloat16)
    assert theirs.logits(tokens).dtype == torch.bfloat16


@of_prefix_kinds
def test_padded_rows_take_a_mask_and_positions_behind_the_prefix_cache(
    exported: tuple[GPTNeoX, Path],
) -> None:
    model, folder = exported
    theirs = InTransformers(folder, model)
    inputs = theirs.tokenizer(["The", TEXT], padding=True, return_tensors="pt")
    mask = behind_sink(inputs)["attention_mask"]
    places: Any = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, 1:] - 1}
    with torch.no_grad():
        found = theirs.model(inputs.input_ids, past_key_values=sink_cache(theirs.model, 2), **places).logits
    for row, seen in enumerate(inputs.attention_mask.bool()):
        ours = model(inputs.input_ids[row, seen][None])
        assert (found[row, seen] - ours).abs().max() < 1e-5


@of_code_kinds
def test_a_model_with_code_is_refused_to_those_who_do_not_trust_it(exported: tuple[GPTNeoX, Path]) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=False)
    assert "trust_remote_code=True" in code_of_card(exported[1])


@of_code_kinds
def test_code_of_a_folder_is_never_run_by_us(exported: tuple[GPTNeoX, Path], tmp_path: Path) -> None:
    model, folder = exported
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    (changed / "modeling_sinktrain.py").write_text("raise SystemExit('it ran')")
    tokens = random_tokens(model.config.vocab_size)
    assert torch.equal(load_model(changed)(tokens), model(tokens))
    again = export(changed, tmp_path / "again").folder
    ours = (again / "modeling_sinktrain.py").read_bytes()
    assert ours == (folder / "modeling_sinktrain.py").read_bytes()


@of_code_kinds
def test_code_steps_through_a_static_cache(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    theirs, tokens = InTransformers(folder, model).model, random_tokens(model.config.vocab_size, seq=9)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    static = theirs.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, theirs.generate(**inputs, **options))


@of_code_kinds
def test_code_trains_its_sink(exported: tuple[GPTNeoX, Path]) -> None:
    model, folder = exported
    theirs, tokens = InTransformers(folder, model).model, random_tokens(model.config.vocab_size, seq=9)
    loss = theirs(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:])
    assert abs(loss.item() - expected.item()) < 1e-5
    loss.backward()
    sinks = [parameter for name, parameter in theirs.named_parameters() if SINK_PART in name]
    assert sinks
    assert all(parameter.grad.any() for parameter in sinks)


def test_model_without_a_tokenizer_is_exported_without_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = model_with(tokenizer, TWO_SINKS)
    result = export(write_run(model, tmp_path / "run"), tmp_path / "out")
    assert not result.has_tokenizer
    files = {path.name for path in result.folder.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    config = read_json(result.folder / "config.json")
    assert config["eos_token_id"] is config["pad_token_id"] is None
    assert read_json(result.folder / "generation_config.json")["suppress_tokens"] == model.sink_ids


def test_old_float16_folder_of_others_is_exported_in_full(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As Pythia stands on the Hub: float16, rotary_pct at the top, the vocabulary's padding unnamed."""
    model = model_with(tokenizer, rotary_pct=0.5)
    theirs = export(write_run_with_tokenizer(model, tokenizer, tmp_path / "run"), tmp_path / "old").folder
    edit_json(theirs / "config.json", remove=("rope_parameters", "sink", "sinktrain", "dtype"))
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    save_file(weights, theirs / "model.safetensors")
    result = export(theirs, tmp_path / "out")
    assert load_model(result.folder).config == model.config
    assert load_model(result.folder).embed_out.weight.equal(weights["embed_out.weight"].float())


@pytest.mark.parametrize("sink", ["none", "token", "kv_bias", "gate"])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_weights_are_rounded_to_the_dtype_asked_for_and_checked_so(
    sink: str, name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run = write_run_with_tokenizer(model_with(tokenizer, sink), tokenizer, tmp_path / "run")
    exported, dtype = export(run, tmp_path / "out", dtype=name), getattr(torch, name)
    stored = load_file(exported.folder / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {dtype}
    config = read_json(exported.folder / "config.json")
    assert config["dtype"] == config["torch_dtype"] == name
    assert exported.max_logit_diff < 1e-4
    ours, theirs = load_model(run).state_dict(), load_model(exported.folder).state_dict()
    for part, weight in ours.items():
        assert theirs[part].equal(weight.to(dtype).float()), part


def test_weights_too_large_for_the_dtype_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = model_with(tokenizer)
    model.embed_out.weight.data[0, 0] = 1e6
    run = write_run_with_tokenizer(model, tokenizer, tmp_path / "run")
    with pytest.raises(
        ExportError,
        match=r"--dtype float16 is too narrow for embed_out.weight of .*; use float32 or bfloat16",
    ):
        export(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = model_with(tokenizer)
    model.embed_out.weight.data[0, 0] = torch.nan
    run = write_run_with_tokenizer(model, tokenizer, tmp_path / "run")
    with pytest.raises(ExportError, match=r"is damaged: embed_out.weight holds what is no finite number"):
        export(run, tmp_path / "out")


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
    assert ("attention-sink" in metadata["tags"]) == (model.config.sink.kind != "none")
    assert f"`{model.config.sink.kind}`: {KINDS[model.config.sink.kind].about}." in card
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
    run = write_run(tiny_model(rotary_pct=1.0), tmp_path / "run")
    written: Callable[..., None] = export_module._write_model

    def spoil(folder: Path, model: GPTNeoX, *others: Any) -> None:
        if broken == "weights":
            model = tiny_model(rotary_pct=1.0, seed=1)
        if broken == "not a number":
            model.embed_out.weight[3, 3] = torch.nan
        written(folder, model, *others)
        if broken == "rotary":
            edit_json(folder / "config.json", remove=("rope_parameters",), rotary_pct=0.5)

    monkeypatch.setattr(export_module, "_write_model", spoil)
    refuse(
        run, tmp_path / "new" / "out", r"logits differ from ours by .*, more than 0.0001; nothing was written"
    )


def add_kind(patch: pytest.MonkeyPatch, loads_as: str) -> None:
    """A kind ``novel``, as a file of somebody else would add it, whose slot has a value."""

    class Novel(AttentionSink):
        name, about = "novel", "a value that nothing else has"

        def __init__(self, hidden_size: int, num_heads: int) -> None:
            super().__init__(hidden_size, num_heads)
            self.share = torch.nn.Parameter(torch.empty(num_heads, hidden_size // num_heads))

        def null_slot(self) -> NullSlot:
            return NullSlot(value=self.share)

    Novel.loads_as = loads_as  # type: ignore[assignment]
    patch.setitem(KINDS, "novel", Novel)


def test_kind_that_the_code_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_kind(monkeypatch, "code")
    run = write_run(tiny_model(sink=SinkConfig("novel")), tmp_path / "run")
    message = r'sink.kind "novel" loads by modeling_sinktrain.py, which does not know it; add it to SINKS in '
    refuse(run, tmp_path / "out", message)


def test_kind_that_does_not_load_as_it_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_kind(monkeypatch, "plain")
    run = write_run(tiny_model(sink=SinkConfig("novel")), tmp_path / "run")
    refuse(run, tmp_path / "out", r"logits differ from ours by .*, more than 0.0001; nothing was written")


def test_new_kind_that_is_a_slot_needs_nothing_but_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_kind(monkeypatch, "prefix")
    model = tiny_model(sink=SinkConfig("novel"))
    folder = export(write_run(model, tmp_path / "run"), tmp_path / "out").folder
    assert torch.equal(load_model(folder)(random_tokens(97)), model(random_tokens(97)))


def test_export_with_other_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    run = write_run_with_tokenizer(model_with(tokenizer, "token"), tokenizer, tmp_path / "run")
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
import json, os, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57."), transformers.__version__
for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}.pt")
    os.chdir(os.path.dirname(folder))
    space = {}
    exec(expected["code"], space)
    trust = {"trust_remote_code": expected["loads_as"] == "code"}
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    has_cache = expected["loads_as"] == "prefix"

    def sink(batch_size):
        return {"past_key_values": space["sink_cache"](model, batch_size)} if has_cache else {}

    def generate(*texts):
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        inputs = space["behind_sink"](inputs) if has_cache else inputs
        tokens = model.generate(**inputs, **sink(len(texts)), max_new_tokens=12, min_new_tokens=12)
        return tokens[:, has_cache:].tolist()

    with torch.no_grad():
        given = model(expected["tokens"], **sink(2)).logits
    alone = generate(expected["text"])[0]
    print(json.dumps({
        "transformers": transformers.__version__, "folder": folder, "class": type(model).__name__,
        "difference": (given - expected["logits"]).abs().max().item(),
        "scale": expected["logits"].abs().max().item(),
        "problems": [value for value in loading.values() if value], "dtype": str(model.dtype),
        "same_ids": tokenizer(expected["text"]).input_ids == expected["ids"],
        "same_generated": alone == expected["generated"],
        "same_in_a_batch": generate("The", expected["text"])[1][-len(alone):] == alone,
        "largest_generated": max(alone[len(expected["ids"]) :]),
    }))
"""


@pytest.mark.slow
def test_transformers_4_gives_our_logits_and_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Installs 4.57 with its own tokenizers and huggingface_hub into a temporary folder: needs an index."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*install, "transformers==4.57.*"], check=True, capture_output=True)
    folders = []
    for sink in ALL:
        model = eager_for_sinks(model_with(tokenizer, sink, rotary_pct=ROTARY[sink]), tokenizer)
        run = write_run_with_tokenizer(model, tokenizer, tmp_path / f"run {sink}")
        result = export(run, tmp_path / sink)
        tokens = random_tokens(model.config.vocab_size, seq=100)
        expected = {"tokens": tokens, "logits": model(tokens), "text": TEXT, "loads_as": result.loads_as}
        expected["ids"] = model.sink_ids + tokenizer.encode(TEXT)
        expected["generated"] = continued_by_us(model, tokenizer, TEXT, 12)
        torch.save(expected | {"code": code_of_card(result.folder)}, f"{result.folder}.pt")
        folders.append(str(result.folder))
    run_there = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS_4, *folders],
        env=os.environ | {"PYTHONPATH": str(packages), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run_there.returncode == 0, run_there.stderr
    print(run_there.stdout)
    seen_by_kind = [json.loads(line) for line in run_there.stdout.splitlines() if line.startswith("{")]
    for seen in seen_by_kind:
        assert seen["difference"] < 1e-6 * seen["scale"], seen
        assert seen["problems"] == [], seen
        assert seen["same_ids"], seen
        assert seen["same_generated"], seen
        assert seen["same_in_a_batch"], seen
        assert seen["largest_generated"] < tokenizer.vocab_size, seen
        assert seen["dtype"] == "torch.float32", seen
    assert [seen["folder"] for seen in seen_by_kind] == folders


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tiny_model(), tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"sinktrain export: .*out cannot be written: .*File too large.*; name another folder\n", said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
