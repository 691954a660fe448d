"""Shards: written, read in windows across their borders, and checked."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sinktrain.data import shards
from sinktrain.data.shards import (
    Manifest,
    ShardWriter,
    SplitCounts,
    TokenSplit,
    read_manifest,
    token_dtype,
    verify,
)
from sinktrain.data.tokenizer import Tokenizer, train_tokenizer
from sinktrain.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["a few words"]), vocab_size=300)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)


def tokens(num_tokens: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 250, num_tokens)


def write(
    folder: Path, tokenizer: Tokenizer, train: npt.NDArray[np.int64], dtype: str = "uint16"
) -> Manifest:
    written = []
    for split, ids in (("train", train), ("val", tokens(30))):
        writer = ShardWriter(folder, split, dtype, 0, [])
        for part in np.array_split(ids, 7):
            writer.append(part)
        writer.finish_shard()
        written += writer.shards
    tokenizer.save(folder / "tokenizer.json")
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.padded_vocab_size,
        sink_token_ids=tokenizer.sink_token_ids,
        eos_token_id=tokenizer.eos_token_id,
        dtype=dtype,
        shards=tuple(written),
        splits={"train": SplitCounts(len(train), 1, 1, 1), "val": SplitCounts(30, 1, 1, 1)},
        source={"location": "somewhere"},
        val_fraction=0.1,
    )
    manifest.save(folder)
    return manifest


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_read_across_shards_equal_slices_of_the_whole(
    dtype: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = tokens(730)
    write(tmp_path, tokenizer, whole, dtype)
    split = TokenSplit.open(tmp_path, "train")
    assert split.num_tokens == 730
    for length in (1, 50, 100, 101, 350, 730):
        starts = np.arange(0, 730 - length + 1)
        windows = split.read(starts, length)
        assert windows.dtype == np.int64
        assert np.array_equal(windows, np.lib.stride_tricks.sliding_window_view(whole, length)[starts])
    assert split.read(np.array([], dtype=np.int64), 5).shape == (0, 5)
    with pytest.raises(AssertionError, match="tokens 730 to 731 of 730"):
        split.read(np.array([730]), 1)


def test_shards_are_little_endian_and_named_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = tokens(250)
    manifest = write(tmp_path, tokenizer, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "tokens-train-00000.bin",
        "tokens-train-00001.bin",
        "tokens-train-00002.bin",
        "tokens-val-00000.bin",
    ]
    assert [shard.tokens for shard in manifest.shards] == [100, 100, 50, 30]
    assert (tmp_path / "tokens-train-00001.bin").read_bytes() == whole[100:200].astype("<u2").tobytes()


def test_dtype_follows_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (50_277, 65_535, 65_536)] == ["uint16", "uint16", "uint32"]


def test_a_full_last_shard_leaves_no_empty_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = write(tmp_path, tokenizer, tokens(200))
    assert [shard.tokens for shard in manifest.shards if shard.split == "train"] == [100, 100]
    assert not list(tmp_path.glob(".*"))


def test_manifest_survives_saving(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = write(tmp_path, tokenizer, tokens(250))
    assert read_manifest(tmp_path) == manifest
    assert verify(tmp_path) == manifest


def test_fingerprint_follows_tokens_and_tokenizer_not_names(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = write(tmp_path, tokenizer, tokens(250))
    renamed = tuple(dataclasses.replace(shard, file=f"other/{shard.file}") for shard in manifest.shards)
    assert dataclasses.replace(manifest, shards=renamed, source={}).fingerprint == manifest.fingerprint
    for other in (
        dataclasses.replace(manifest, shards=manifest.shards[::-1]),
        dataclasses.replace(manifest, tokenizer_sha256="other"),
    ):
        assert other.fingerprint != manifest.fingerprint


def test_pickled_split_holds_no_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, tokens(730))
    pickled = pickle.dumps(TokenSplit.open(tmp_path, "train"))
    assert len(pickled) < 500
    assert pickle.loads(pickled).read(np.array([95]), 10).tolist() == [tokens(730)[95:105].tolist()]


def test_writer_goes_on_where_it_was_counted_to(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever was written after the count, a finished shard too, is taken back."""
    whole = tokens(330)
    (tmp_path / "whole").mkdir()
    expected = write(tmp_path / "whole", tokenizer, whole)
    for counted in (0, 10, 100, 130, 300, 330):
        for ahead in (0, 10, 105, 230):
            writer = ShardWriter(tmp_path, "train", "uint16", 0, [])
            writer.append(whole[:counted])
            finished = list(writer.shards)
            writer.append(whole[counted : counted + ahead])
            writer.close()
            writer = ShardWriter(tmp_path, "train", "uint16", counted, finished)
            writer.append(whole[counted:])
            writer.finish_shard()
            assert writer.shards == [shard for shard in expected.shards if shard.split == "train"]


def test_writer_refuses_to_go_on_after_tokens_were_lost(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "val", "uint16", 0, [])
    writer.append(tokens(150))
    writer.close()
    with pytest.raises(DataError, match=r"tokens were lost; delete .* and prepare the text again"):
        ShardWriter(tmp_path, "val", "uint16", 180, writer.shards)
    (tmp_path / "tokens-val-00000.bin").unlink()
    with pytest.raises(DataError, match=r"tokens-val-00000.bin: the shard is missing"):
        ShardWriter(tmp_path, "val", "uint16", 150, writer.shards)


def test_truncated_shard_is_named_when_opened(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, tokens(250))
    shard = tmp_path / "tokens-train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    for check in (lambda: TokenSplit.open(tmp_path, "train"), lambda: verify(tmp_path)):
        with pytest.raises(DataError) as error:
            check()
        assert str(error.value) == (
            f"{shard}: the shard has 198 bytes, not 200; prepare the text again into another folder"
            f' (check the others with "sinktrain prepare --verify {tmp_path}")'
        )
    assert TokenSplit.open(tmp_path, "val").num_tokens == 30


def test_missing_shard_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, tokens(250))
    (tmp_path / "tokens-val-00000.bin").unlink()
    with pytest.raises(
        DataError, match=r"tokens-val-00000.bin: the shard is missing; prepare the text again"
    ):
        TokenSplit.open(tmp_path, "val")


def test_verify_finds_an_edited_shard_and_another_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, tokens(250))
    shard = tmp_path / "tokens-train-00002.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        DataError, match=r"tokens-train-00002.bin: the shard was edited; prepare the text again"
    ):
        verify(tmp_path)
    train_tokenizer(iter(["other words"]), vocab_size=300).save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json: not the tokenizer that made these shards"):
        verify(tmp_path)


def test_unusable_manifests_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='no prepared shards here; make them with "sinktrain prepare TEXT'):
        read_manifest(tmp_path)
    book = tmp_path / "book.txt"
    book.write_text("a text")
    with pytest.raises(DataError, match=rf'is a file, and .*"sinktrain prepare {book} --out DIR"'):
        read_manifest(book)
    write(tmp_path, tokenizer, tokens(250))
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    for text in ("{", "[]", '{"kind": "run"}'):
        path.write_text(text)
        with pytest.raises(
            DataError, match=r"manifest.json: not a manifest of shards; prepare the text again"
        ):
            read_manifest(tmp_path)
    path.write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(DataError, match=r"manifest.json: format_version 2, but this sinktrain reads 1;"):
        read_manifest(tmp_path)
    path.write_text(json.dumps(content | {"splits": {}}))
    with pytest.raises(DataError, match=r"manifest.json: not a manifest of shards; prepare the text again"):
        read_manifest(tmp_path)
