"""Texts become the tokens of a model's own tokenizer, or say why they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_model, write_run
from tiny_runs import LINES, TEXT, tiny_tokenizer, write_text_run
from tiny_shards import write_shards

from sinktrain.data.shards import TokenSplit
from sinktrain.data.sources import Source
from sinktrain.data.tokenizer import load_tokenizer
from sinktrain.errors import DataError, ModelError
from sinktrain.evaluation import texts
from sinktrain.evaluation.texts import TokenizedText, tokenize_for
from sinktrain.model.checkpoints import load_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_text_run(tmp_path / "run")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def run_of_shards(tmp_path: Path, shards: Path) -> Path:
    return write_text_run(tmp_path / "run of shards", tokenizer=load_tokenizer(str(shards)))


def tokens_of(run: Path, text: Path | str, max_tokens: int | None = None) -> TokenizedText:
    return tokenize_for(load_model(run).config, str(run), Source(str(text)), max_tokens)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_documents_are_joined_by_end_of_text(run: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "two.txt", f"{LINES[0]}\n<|doc|>\n{LINES[1]}")
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    expected = [*tokenizer.encode(LINES[0] + "\n"), eos, *tokenizer.encode(LINES[1]), eos]
    assert tokens_of(run, text).tokens.tolist() == expected
    assert tokens_of(run, text, 10).tokens.tolist() == expected[:10]
    assert tokens_of(run, text, 10_000).tokens.tolist() == expected
    assert tokens_of(run, text).tokens.dtype == np.int64


def test_a_long_document_is_tokenised_piece_by_piece_and_only_as_far_as_needed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A book of 240 MB took minutes, all of it tokenised for the first 65,536 tokens."""
    monkeypatch.setattr(texts, "PIECE_BYTES", 200)
    text = write(tmp_path / "long.txt", TEXT)
    tokenizer = tiny_tokenizer()
    found = tokens_of(run, text)
    assert tokenizer.decode(found.tokens.tolist()) == TEXT + tokenizer.eos_token
    assert tokens_of(run, text, 50).tokens.tolist() == found.tokens[:50].tolist()

    encoded: list[str] = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, piece: encoded.append(piece) or encode(self, piece)
    )
    tokens_of(run, text, 50)
    assert len(encoded) == 1


def test_bytes_are_those_of_the_text_without_end_of_text(run: Path, tmp_path: Path) -> None:
    words = "naïve 日本語 🙂"
    found = tokens_of(run, write(tmp_path / "words.txt", f"{words}\n<|doc|>\n{words}"))
    assert found.num_bytes(found.tokens) == 2 * len(words.encode()) + 1
    assert found.num_bytes(found.tokens[-1:]) == 0


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    run = write_run(tiny_model(), tmp_path / "bare")
    with pytest.raises(ModelError, match=rf"^{run} has no tokenizer; put the tokenizer.json of its training"):
        tokens_of(run, write(tmp_path / "text.txt", TEXT))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its ids went beyond the embedding: an IndexError from inside the network."""
    run = write_text_run(tmp_path / "small", vocab_size=97)
    with pytest.raises(ModelError, match=rf"^{run} has 97 vocabulary rows, its tokenizer \d+ ids; put the"):
        tokens_of(run, write(tmp_path / "text.txt", TEXT))


def test_of_shards_the_held_out_split_is_read(run_of_shards: Path, shards: Path) -> None:
    held_out = TokenSplit.open(shards, "val")
    everything = held_out.read(np.zeros(1, dtype=np.int64), held_out.num_tokens)[0]
    assert np.array_equal(tokens_of(run_of_shards, shards).tokens, everything)
    assert np.array_equal(tokens_of(run_of_shards, shards, 30).tokens, everything[:30])
    assert np.array_equal(tokens_of(run_of_shards, shards, 10_000).tokens, everything)


def test_shards_are_found_in_the_home_folder(
    run_of_shards: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    assert len(tokens_of(run_of_shards, "~/shards").tokens) == 500


def test_shards_need_no_tokenizer_of_the_model(tmp_path: Path, shards: Path, run_of_shards: Path) -> None:
    bare = write_run(tiny_model(vocab_size=384), tmp_path / "bare")
    found, expected = tokens_of(bare, shards), tokens_of(run_of_shards, shards)
    assert np.array_equal(found.tokens, expected.tokens)
    assert found.tokenizer.sha256 == expected.tokenizer.sha256


def test_shards_of_another_tokenizer_are_refused_with_a_remedy_that_works(run: Path, shards: Path) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    with pytest.raises(DataError, match="not made with the tokenizer of") as caught:
        tokens_of(checkpoint, shards)
    remedy = str(caught.value).rpartition("--tokenizer ")[2]
    assert load_tokenizer(remedy).sha256 == tiny_tokenizer().sha256


def test_shards_of_a_larger_model_are_refused(tmp_path: Path, shards: Path) -> None:
    bare = write_run(tiny_model(), tmp_path / "bare")
    message = rf"^{bare} has 97 vocabulary rows, the shards {shards} use \d+; they belong to another model$"
    with pytest.raises(ModelError, match=message):
        tokens_of(bare, shards)


def test_a_shard_edited_beyond_its_vocabulary_is_refused(run_of_shards: Path, shards: Path) -> None:
    """The token went beyond the embedding: an IndexError from inside the network."""
    shard = shards / "tokens-val-00000.bin"
    shard.write_bytes(np.array([7, 60_000], dtype="<u2").tobytes() + shard.read_bytes()[4:])
    with pytest.raises(
        DataError, match=rf"^{shards}: a shard was edited: it holds token 60000 of a vocabulary"
    ):
        tokens_of(run_of_shards, shards)


def test_a_truncated_shard_is_refused(run_of_shards: Path, shards: Path) -> None:
    shard = shards / "tokens-val-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"has 998 bytes, not 1000; .*--verify"):
        tokens_of(run_of_shards, shards)


def test_options_of_other_texts_are_refused_for_shards(run_of_shards: Path, shards: Path) -> None:
    config = load_model(run_of_shards).config
    with pytest.raises(DataError, match="are not for prepared shards, whose held-out split is scored"):
        tokenize_for(config, str(run_of_shards), Source(str(shards), split="val"))


def test_tokenizer_file_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer"):
        tokens_of(run, write(tmp_path / "text.txt", TEXT))
