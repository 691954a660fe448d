"""Text as a stream of documents: local files, folders of them, Hub datasets; and its cuts into pieces."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO, cast

from sinktrain.errors import DataError, did_you_mean, first_line

DOCUMENT_LINE = b"<|doc|>"
BYTE_ORDER_MARK = "\ufeff"
DEFAULT_COLUMN = "text"
FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)

# Where a piece may end, best places first: after a blank line, a line, a sentence, a space.
PIECE_ENDS = (
    (b"\n\n", b"\n\r\n"),
    (b"\n",),
    tuple(end.encode() for end in (". ", "! ", "? ", '." ', '!" ', '?" ', ".” ", "!” ", "?” ", "。")),
    (b" ",),
)


@dataclass(frozen=True)
class Source:
    """Where a text lies: a file, a folder of files, or a Hub dataset id.

    Attributes:
        location: as the user typed it.
        text_column: of .jsonl, .parquet and Hub datasets; None means ``text``.
        subset, split, revision: of a Hub dataset.
    """

    location: str
    text_column: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the location looks like a path, which is then never sent to the Hub."""
        return (
            _path_of(self).exists()
            or self.location.startswith((".", "/", "~"))
            or _format_of(_path_of(self)) is not None
            or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.location) is None
        )


def is_shards(location: str) -> bool:
    """Whether this is a folder of prepared shards. (A run folder has a manifest.json too, but no tokens.)"""
    folder = Path(location).expanduser()
    return (folder / "manifest.json").is_file() and any(folder.glob("tokens-*.bin"))


def documents(source: Source, skip: int = 0) -> Iterator[str]:
    """Yield the documents of a text that hold more than whitespace, the first ``skip`` of these left out.

    Raises:
        DataError: the text is missing, empty, damaged, not UTF-8, or lacks the column. A missing one is
            found at once, the rest while reading.
    """
    found = _local_documents(source, local_files(source)) if source.is_local else hub_documents(source)
    return itertools.islice(found, skip, None)


def local_files(source: Source) -> list[Path]:
    """Return the files of a local text, sorted by path.

    Raises:
        DataError: there is none, or an option of Hub datasets was given.
    """
    if (source.subset, source.split, source.revision) != (None, "train", None):
        raise DataError(
            f"{source.location}: --subset, --split and --revision are for Hub datasets, not files; "
            "of a model write ORG/NAME@REVISION"
        )
    path = _path_of(source)
    if is_shards(source.location):
        raise DataError(f"{source.location}: holds prepared shards, not text")
    if path.is_dir():
        return _files_in_folder(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder" + did_you_mean(path.name, siblings))
    if _format_of(path) is None:
        raise DataError(f'{path}: unknown file type "{path.suffix}"; {_known_types()}')
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return [path]


def plain_bytes(source: Source) -> int | None:
    """Return the bytes of a local text as its files have them, or None if some are not plain text."""
    files = local_files(source)
    if any(_format_of(path) not in ((".txt", ""), (".jsonl", "")) for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def hub_documents(source: Source) -> Iterator[str]:
    """Stream the documents of a dataset through ``datasets``, without a full copy on disk."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f'{source.location}: no such file or folder, and Hub datasets need "pip install datasets"'
        ) from None
    try:
        rows = load_dataset(
            source.location, name=source.subset, split=source.split, revision=source.revision, streaming=True
        )
        found = (_text_of(row, source, source.location) for row in rows)
        yield from _usable(found, source)
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, fsspec and the HTTP clients share no base class
        raise DataError(
            f"{source.location}: no such file or folder, and not a readable Hub dataset: {first_line(error)}"
        ) from error


def pieces(document: str, max_bytes: int) -> Iterator[str]:
    """Cut a document into pieces of at most ``max_bytes`` UTF-8 bytes which join to the document exactly.

    Each piece ends at the last paragraph end (blank line) that fits; where none fits, at the last line
    end, then sentence end, then space, then character. Takes time linear in the document.
    """
    assert max_bytes >= 4, "a piece must have room for any one character"
    text = document.encode()
    begin = 0
    while begin < len(text):
        end = _piece_end(text, begin, begin + max_bytes)
        yield text[begin:end].decode()
        begin = end


def is_held_out(piece: str, fraction: float) -> bool:
    """Whether a piece belongs to the held-out text. Depends on its words alone: twins stay together."""
    digest = hashlib.sha256(piece.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _piece_end(text: bytes, begin: int, limit: int) -> int:
    if limit >= len(text):
        return len(text)
    for ends in PIECE_ENDS:
        found = [at + len(end) for end in ends if (at := text.rfind(end, begin, limit)) >= 0]
        if found:
            return max(found)
    while text[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return limit


def _path_of(source: Source) -> Path:
    return Path(source.location).expanduser()


def _format_of(path: Path) -> tuple[str, str] | None:
    """Return (format, compression or ""), or None for a file that holds no text we can read."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    return next(((ending, compression) for ending in FORMATS if name.endswith(ending)), None)


def _known_types() -> str:
    return f"text comes in {', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}"


def _files_in_folder(folder: Path) -> list[Path]:
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and _format_of(path) is not None
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"{folder}: the folder holds no text; {_known_types()}")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _local_documents(source: Source, files: list[Path]) -> Iterator[str]:
    return _usable(itertools.chain.from_iterable(_file_documents(path, source) for path in files), source)


def _usable(found: Iterator[str], source: Source) -> Iterator[str]:
    """Drop documents of whitespace; nothing left is an error."""
    is_empty = True
    for document in found:
        if document and not document.isspace():
            is_empty = False
            yield document
    if is_empty:
        raise DataError(f"{source.location}: holds no usable document, nothing but whitespace")


def _file_documents(path: Path, source: Source) -> Iterator[str]:
    file_format, compression = cast(tuple[str, str], _format_of(path))
    read = {".txt": _txt_documents, ".jsonl": _jsonl_documents, ".parquet": _parquet_documents}[file_format]
    open_file = _opener(path, compression)
    try:
        with open_file() as stream:
            yield from read(path, stream, source)
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from error


def _opener(path: Path, compression: str) -> Callable[[], BinaryIO]:
    """Return what opens a file for reading its bytes, and raises ``DAMAGE`` where they end too early."""
    if compression == ".gz":
        return lambda: cast(BinaryIO, gzip.open(path))
    if compression == ".xz":
        return lambda: cast(BinaryIO, lzma.open(path))
    if compression == ".zst":  # not through zstandard, which takes a truncated file for a whole one
        pyarrow = _pyarrow(path)
        return lambda: cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return lambda: path.open("rb")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f'{path}: reading it needs "pip install pyarrow"') from None
    return pyarrow


def _txt_documents(path: Path, stream: BinaryIO, source: Source) -> Iterator[str]:
    lines: list[bytes] = []
    begin = end = 0  # byte offsets of the document in the file
    for line in stream:
        end += len(line)
        if line.strip() == DOCUMENT_LINE:
            yield _decoded(b"".join(lines), path, begin)
            lines, begin = [], end
        else:
            lines.append(line)
    yield _decoded(b"".join(lines), path, begin)


def _jsonl_documents(path: Path, stream: BinaryIO, source: Source) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decoded(line, path, offset)
        offset += len(line)
        if text.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not a line of JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}: not a JSON object with a "{source.text_column or DEFAULT_COLUMN}"')
        yield _text_of(row, source, where)


def _parquet_documents(path: Path, stream: BinaryIO, source: Source) -> Iterator[str]:
    pyarrow = _pyarrow(path)
    is_compressed = _format_of(path) != (".parquet", "")
    with _seekable_copy(stream) if is_compressed else nullcontext(stream) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            column = _column(source, table.schema_arrow.names, str(path))
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from (_text_of(row, source, str(path)) for row in batch.to_pylist())
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: cannot be read: {first_line(error)}") from error


@contextmanager
def _seekable_copy(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Give the bytes on disk: parquet is read from its end, decompressors only go forward."""
    with tempfile.TemporaryFile() as copy:
        copyfileobj(stream, copy)
        yield cast(BinaryIO, copy)


def _text_of(row: dict[str, Any], source: Source, where: str) -> str:
    column = _column(source, row, where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f'{where}: column "{column}" holds {type(text).__name__}, not text')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f'{where}: column "{column}" holds half a character (a lone surrogate)') from None
    return text


def _column(source: Source, columns: Iterable[str], where: str) -> str:
    """Return the column that holds the text, after a look whether it is there."""
    column = source.text_column or DEFAULT_COLUMN
    known = list(columns)
    if column not in known:
        there = ", ".join(f'"{name}"' for name in known) or "none"
        raise DataError(
            f'{where}: no column "{column}"{did_you_mean(column, known)};'
            f" there is {there}; choose one with --text-column"
        )
    return column


def _decoded(text: bytes, path: Path, offset: int) -> str:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {offset + error.start}") from None
    return decoded if offset else decoded.removeprefix(BYTE_ORDER_MARK)
