"""Documents from files, folders and the Hub, and their cuts into pieces."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from sinktrain.data.sources import (
    Source,
    documents,
    hub_documents,
    is_held_out,
    is_shards,
    pieces,
    plain_bytes,
)
from sinktrain.errors import DataError


def zst(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}
TEXTS = ["First document.\n", "Zweites Dokument: süß.\n"]


def parquet_bytes(columns: dict[str, list[object]], path: Path) -> bytes:
    parquet.write_table(pyarrow.table(columns), path)
    content = path.read_bytes()
    path.unlink()
    return content


def content_of(file_format: str, folder: Path) -> bytes:
    if file_format == ".txt":
        return "<|doc|>\n".join(TEXTS).encode()
    if file_format == ".jsonl":
        return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()
    return parquet_bytes({"id": [1, 2], "text": list(TEXTS)}, folder / "table")


def read(location: Path, **options: str) -> list[str]:
    return list(documents(Source(str(location), **options)))


def message_of(location: Path | str, **options: str) -> str:
    with pytest.raises(DataError) as error:
        list(documents(Source(str(location), **options)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("file_format", [".txt", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_documents(file_format: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"book{file_format}{compression}"
    path.write_bytes(COMPRESS[compression](content_of(file_format, tmp_path)))
    assert read(path) == TEXTS


def test_a_folder_is_read_in_sorted_order_with_hidden_and_other_files_left_out(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden.txt", ".git/x.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt"]


def test_skip_counts_usable_documents(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n<|doc|>\n \n<|doc|>\ntwo\n  <|doc|>  \nthree")
    assert list(documents(Source(str(path)))) == ["one\n", "two\n", "three"]
    assert list(documents(Source(str(path)), skip=2)) == ["three"]
    assert list(documents(Source(str(path)), skip=3)) == []


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("words", encoding="utf-8-sig")
    assert read(path) == ["words"]


def test_zst_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt.zst"
    path.write_bytes(zst(b"one ") + zst(b"two"))
    assert read(path) == ["one two"]


def test_null_in_a_column_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null}\n\n{"text": "kept"}\n')
    assert read(path) == ["kept"]


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes({"body": ["kept"]}, tmp_path / "table"))
    assert read(path, text_column="body") == ["kept"]


def test_plain_bytes_are_known_for_plain_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("süß")
    (tmp_path / "b.jsonl").write_text('{"text": ""}')
    assert plain_bytes(Source(str(tmp_path))) == 5 + 12
    (tmp_path / "c.txt.gz").touch()
    assert plain_bytes(Source(str(tmp_path))) is None


def test_missing_file_names_its_likely_sibling(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("words")
    assert 'no such file or folder; did you mean "shakespeare.txt"?' in message_of(
        tmp_path / "shakespear.txt"
    )


def test_a_path_is_missed_at_once_and_never_sent_to_the_hub() -> None:
    for location in (
        "./corpus",
        "/nowhere/corpus",
        "~/nowhere-corpus",
        "corpus.jsonl.gz",
        "a/b/c",
        "corpus/",
    ):
        with pytest.raises(DataError, match="no such file or folder"):
            documents(Source(location))
    assert not Source("org/name").is_local
    assert not Source("name").is_local


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "book.txt").touch()
    assert message_of(tmp_path / "book.txt").endswith("book.txt: the file is empty")


@pytest.mark.parametrize("content", [b"\n \n", gzip.compress(b"", mtime=0)])
def test_text_without_a_usable_document_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("book.txt.gz" if content.startswith(b"\x1f") else "book.txt")
    path.write_bytes(content)
    assert "holds no usable document, nothing but whitespace" in message_of(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf_8_names_the_byte(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(mark + b"good\n<|doc|>\nb\xff")
    assert message_of(path).endswith(f"book.txt: not UTF-8 at byte {14 + len(mark)}")
    path.write_bytes(mark + b"b\xff")
    assert message_of(path).endswith(f"book.txt: not UTF-8 at byte {1 + len(mark)}")


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_unknown_column_names_those_there_are(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{file_format}"
    path.write_text('{"id": 1, "texts": "words"}\n')
    if file_format == "parquet":
        path.write_bytes(parquet_bytes({"id": [1], "texts": ["words"]}, tmp_path / "table"))
    message = message_of(path)
    assert 'no column "text"; did you mean "texts"?; there is "id", "texts"; choose one' in message
    assert message_of(path, text_column="id").endswith('column "id" holds int, not text')


def test_unknown_file_type_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "book.pdf").write_text("words")
    known = "text comes in .txt, .jsonl, .parquet, also with .gz, .xz, .zst"
    assert message_of(tmp_path / "book.pdf").endswith(f'unknown file type ".pdf"; {known}')
    assert message_of(tmp_path).endswith(f"the folder holds no text; {known}")


def test_malformed_line_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n')
    assert "rows.jsonl:2: not a line of JSON: Expecting value" in message_of(path)
    path.write_text('{"text": "good"}\n["text"]\n')
    assert message_of(path).endswith('rows.jsonl:2: not a JSON object with a "text"')
    path.write_text('{"text": "half \\ud800"}\n')
    assert message_of(path).endswith('rows.jsonl:1: column "text" holds half a character (a lone surrogate)')


@pytest.mark.parametrize("name", ["book.txt.gz", "book.txt.xz", "book.txt.zst", "rows.parquet"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    words = " ".join(str(number) for number in range(5000)).encode()
    content = COMPRESS.get(path.suffix, lambda _: content_of(".parquet", tmp_path))(words)
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"junk" * 10)
    assert f"{name}: cannot be read: " in message_of(path)


@pytest.mark.parametrize("name", ["book.txt.zst", "rows.parquet"])
def test_missing_pyarrow_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"some bytes")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message_of(tmp_path / name).endswith(f'{name}: reading it needs "pip install pyarrow"')


def test_hub_options_are_refused_for_files(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("words")
    message = "--subset, --split and --revision are for Hub datasets, not files"
    assert message in message_of(tmp_path / "book.txt", split="test")
    assert message in message_of(tmp_path / "book.txt", subset="en")


def test_shards_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_shards(str(tmp_path))
    (tmp_path / "tokens-train-00000.bin").touch()
    assert is_shards(str(tmp_path))
    assert message_of(tmp_path).endswith("holds prepared shards, not text")


def test_local_text_imports_neither_datasets_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("words")
    script = (
        "import sys; from sinktrain.data.sources import Source, documents\n"
        f"assert list(documents(Source({str(tmp_path)!r}))) == ['words']\n"
        "print([name for name in ('datasets', 'torch', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class TestHub:
    """The real ``datasets`` package, on a dataset folder on disk."""

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "dataset"
        folder.mkdir()
        for split in ("train", "test"):
            columns: dict[str, list[object]] = {
                "text": [f"{split} one", " ", f"{split} two"],
                "id": [1, 2, 3],
            }
            (folder / f"{split}.parquet").write_bytes(parquet_bytes(columns, tmp_path / "table"))
        return folder

    def test_split_is_streamed_without_its_empty_documents(self, folder: Path) -> None:
        assert list(hub_documents(Source(str(folder)))) == ["train one", "train two"]
        assert list(hub_documents(Source(str(folder), split="test"))) == ["test one", "test two"]

    def test_unknown_column_names_those_there_are(self, folder: Path) -> None:
        with pytest.raises(
            DataError, match=r'no column "txt"; did you mean "text"[?]; there is "text", "id"'
        ):
            list(hub_documents(Source(str(folder), text_column="txt")))

    def test_unknown_split_is_one_line(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"not a readable Hub dataset: .*dev") as error:
            list(hub_documents(Source(str(folder), split="dev")))
        assert "\n" not in str(error.value)

    def test_unknown_dataset_is_one_line(self) -> None:
        assert "no such file or folder, and not a readable Hub dataset: " in message_of("nobody/nothing")

    def test_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert message_of("org/name").endswith('Hub datasets need "pip install datasets"')


def random_document(generator: random.Random, num_parts: int) -> str:
    parts = ["word", "süß", "日本", "🙂", " ", ". ", "\n", "\n\n", "\r\n\r\n", "x" * 40]
    return "".join(generator.choices(parts, k=num_parts))


@pytest.mark.parametrize("max_bytes", [4, 5, 16, 64, 1000])
def test_pieces_join_to_the_document_and_none_is_too_long(max_bytes: int) -> None:
    generator = random.Random(max_bytes)
    for _ in range(50):
        document = random_document(generator, 100)
        cut = list(pieces(document, max_bytes))
        assert "".join(cut) == document
        assert all(0 < len(piece.encode()) <= max_bytes for piece in cut)


@pytest.mark.parametrize(
    ("document", "cut"),
    [
        ("One. Two.\n\nThree.\n\nFour", ["One. Two.\n\nThree.\n\n", "Four"]),
        ("One.\r\n\r\nTwo and three", ["One.\r\n\r\n", "Two and three"]),
        ("One line\nof two words\nor more", ["One line\n", "of two words\nor more"]),
        ("It ends. Here it goes on and on", ["It ends. ", "Here it goes on and ", "on"]),
        ("日本語日本語日本語", ["日本語日本語", "日本語"]),
    ],
)
def test_pieces_end_at_the_best_place_that_fits(document: str, cut: list[str]) -> None:
    assert list(pieces(document, 20)) == cut


@pytest.mark.parametrize("unit", ["a", "a ", "a\n", "a\n\n", "a\n\n" + "b" * 70_000, "é"])
def test_pieces_take_linear_time(unit: str) -> None:
    """A megabyte takes milliseconds, wherever its ends lie; quadratic time would take minutes."""
    document = unit * (4_000_000 // len(unit))
    started_at = time.monotonic()
    assert sum(map(len, pieces(document, 1 << 16))) == len(document)
    assert time.monotonic() - started_at < 2


def test_held_out_share_follows_the_fraction_and_nothing_else() -> None:
    texts = [f"piece {number}" for number in range(4000)]
    held_out = [text for text in texts if is_held_out(text, 0.1)]
    assert 300 < len(held_out) < 500
    assert held_out == [text for text in texts if is_held_out(text, 0.1)]
    assert set(held_out) < {text for text in texts if is_held_out(text, 0.2)}
    assert not any(is_held_out(text, 0) for text in texts)
    assert all(is_held_out(text, 1) for text in texts)
