"""Tokenizers: trained, loaded, and the same with and without their sinks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from sinktrain.data.tokenizer import (
    RESERVED_SINKS,
    SINK_TOKENS,
    Tokenizer,
    load_tokenizer,
    sink_token_name,
    train_tokenizer,
)
from sinktrain.errors import DataError

TEXT = "It was the best of times, it was the worst of times.\n\n  süß 日本 🙂 <|sink|> <|endoftext|>\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT] * 3), vocab_size=300)


def definition_of(vocab: dict[str, int], special: list[str]) -> dict[str, Any]:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    definition: dict[str, Any] = json.loads(backend.to_str())
    return definition


def write_folder(folder: Path, definition: dict[str, Any], **configs: Any) -> str:
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def message_of(name: str) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    for text in (TEXT, "\x00 \r\n\t", " leading", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([TEXT, "a"]) == [tokenizer.encode(TEXT), tokenizer.encode("a")]


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|endoftext|><|sink|>")
    assert tokenizer.eos_token_id not in ids
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|endoftext|>"


def test_trained_vocabulary_leaves_room_for_the_sinks(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300 - RESERVED_SINKS
    assert tokenizer.sink_token_ids == tuple(range(292, 300))
    assert tokenizer.padded_vocab_size == 384
    assert tokenizer.eos_token_id == 0


def test_training_again_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter([TEXT] * 3), vocab_size=300).sha256 == tokenizer.sha256
    assert train_tokenizer(iter([TEXT] * 3), vocab_size=299).sha256 != tokenizer.sha256


def test_tiny_text_gives_fewer_merges_than_asked_for() -> None:
    assert train_tokenizer(iter(["aa aa"]), vocab_size=4096).vocab_size < 270


def test_a_mistake_in_the_text_ends_training_with_its_message() -> None:
    def texts() -> Any:
        yield "good"
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2 is bad"):
        train_tokenizer(texts(), vocab_size=300)


@pytest.mark.parametrize("vocab_size", [0, 265])
def test_vocabulary_without_room_for_a_merge_is_refused(vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"--vocab-size {vocab_size} is too small: .* use 266 or more"):
        train_tokenizer(iter(["text"]), vocab_size)


def test_padding_holds_pythias_sink_at_50277() -> None:
    vocab = {f"t{index}": index for index in range(50_276)}
    pythia = Tokenizer(definition_of(vocab, ["<|endoftext|>"]))
    assert (pythia.vocab_size, pythia.padded_vocab_size, pythia.sink_token_ids[0]) == (50_277, 50_304, 50_277)


def test_vocabulary_with_holes_counts_up_to_its_largest_id() -> None:
    assert Tokenizer(definition_of({"a": 0, "</s>": 9}, [])).vocab_size == 10


@pytest.mark.parametrize("count", [0, 1, 2, RESERVED_SINKS])
def test_sinks_come_first_exactly_once_and_loading_takes_them_away(
    count: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    exported = tokenizer.with_sinks(count)
    assert exported.encode("times").ids == [*tokenizer.sink_token_ids[:count], *tokenizer.encode("times")]
    assert exported.encode("times", add_special_tokens=False).ids == tokenizer.encode("times")
    assert [exported.token_to_id(name) for name in SINK_TOKENS[:count]] == list(
        tokenizer.sink_token_ids[:count]
    )

    exported.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.padded_vocab_size == tokenizer.padded_vocab_size
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_sink_tokens_are_numbered_from_the_second_on() -> None:
    assert [sink_token_name(index) for index in range(3)] == ["<|sink|>", "<|sink_1|>", "<|sink_2|>"]


def test_save_and_load_keep_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for loaded in (load_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path / "tokenizer.json"))):
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.eos_token == "<|endoftext|>"


def test_hash_ignores_layout_truncation_and_post_processor(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.with_sinks(1).to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(backend.to_str()), indent=8, ensure_ascii=True))
    loaded = Tokenizer.from_file(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_end_of_text_token_is_what_the_folder_says(file: str, as_object: bool, tmp_path: Path) -> None:
    definition = definition_of({"a": 0}, ["<|endoftext|>", "<|im_end|>"])
    token = {"content": "<|im_end|>"} if as_object else "<|im_end|>"
    loaded = load_tokenizer(write_folder(tmp_path, definition, **{file: {"eos_token": token}}))
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|im_end|>", 2)

    (tmp_path / "saved").mkdir()
    loaded.save(tmp_path / "saved" / "tokenizer.json")
    assert load_tokenizer(str(tmp_path / "saved")).eos_token == "<|im_end|>"


def test_end_of_text_token_is_the_first_known_one_otherwise(tmp_path: Path) -> None:
    definition = definition_of({"a": 0}, ["[SEP]", "</s>"])
    assert load_tokenizer(write_folder(tmp_path, definition)).eos_token == "</s>"
    assert load_tokenizer(write_folder(tmp_path, definition, tokenizer_config={})).eos_token == "</s>"


def test_missing_end_of_text_token_is_one_line(tmp_path: Path) -> None:
    definition = definition_of({"a": 0}, [])
    looked_for = r"looked for <|endoftext|>, </s>, <eos>, <|end_of_text|>, [SEP]"
    name = write_folder(tmp_path, definition)
    assert (
        message_of(name) == f"{tmp_path}/tokenizer.json: the tokenizer has no end-of-text token; {looked_for}"
    )
    name = write_folder(tmp_path, definition, tokenizer_config={"eos_token": "<end>"})
    assert message_of(name).endswith("the tokenizer has no end-of-text token; looked for <end>")


def test_unusable_tokenizer_files_are_named(tmp_path: Path) -> None:
    assert message_of(str(tmp_path)) == f"{tmp_path}: no tokenizer.json in this folder"
    (tmp_path / "tokenizer.json").write_text("{")
    assert f"{tmp_path}/tokenizer.json: not a tokenizer: " in message_of(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert f"{tmp_path}/tokenizer.json: not a tokenizer: " in message_of(str(tmp_path))
    name = write_folder(tmp_path, definition_of({"a": 0}, ["</s>"]), tokenizer_config=[])
    assert message_of(name) == f"{tmp_path}/tokenizer_config.json: not a JSON object"
    missing = str(tmp_path / "tokeniser.json")
    assert message_of(missing).endswith('tokeniser.json: no such tokenizer; did you mean "tokenizer.json"?')


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("cannot reach the Hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    expected = "org/name is not here, and the Hub does not give it: cannot reach the Hub"
    assert message_of("org/name") == expected


def test_hub_tokenizer_is_read_from_its_snapshot(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert load_tokenizer("org/name").sha256 == tokenizer.sha256


def test_loading_imports_neither_transformers_nor_torch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    script = (
        "import sys; from sinktrain.data.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(tmp_path)!r})\n"
        "print([name for name in ('transformers', 'torch', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class TestTransformers:
    def test_saved_by_transformers_it_is_still_the_same(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        exported = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.with_sinks(2), bos_token="<|sink_1|>", eos_token="<|endoftext|>"
        )
        assert exported("times").input_ids == [*tokenizer.sink_token_ids[:2], *tokenizer.encode("times")]
        exported.save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path)).sha256 == tokenizer.sha256

    def test_folder_without_tokenizer_json_is_converted(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        model = json.loads(tokenizer.backend.to_str())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        loaded = load_tokenizer(str(tmp_path))
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.eos_token == "<|endoftext|>"

    def test_folder_that_cannot_be_converted_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
        assert message_of(str(tmp_path)) == f"{tmp_path}: no tokenizer.json in this folder"
        (tmp_path / "vocab.json").write_text("not json\n\n")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        assert "no tokenizer.json, and transformers cannot make one: " in message_of(str(tmp_path))


def test_added_tokens_of_others_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken("    ", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.vocab_size == tokenizer.vocab_size + 1
    assert loaded.encode("a    b")[1:2] == [tokenizer.vocab_size]
