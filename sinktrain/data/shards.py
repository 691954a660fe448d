"""Token shards on disk: their manifest, reading, writing and checking them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sinktrain.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from sinktrain.errors import DataError
from sinktrain.files import sha256_file, write_json
from sinktrain.progress import progress_bar

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
LARGEST_UINT16_VOCABULARY = 65_535
_AGAIN = "prepare the text again into another folder"


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    file: str
    split: str
    tokens: int
    sha256: str


@dataclass
class SplitCounts:
    """What a split holds. A document with pieces in both splits counts in both."""

    tokens: int = 0
    documents: int = 0
    pieces: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Manifest:
    """What prepared shards hold: the content of ``manifest.json``.

    Attributes:
        tokenizer_sha256: ``Tokenizer.sha256`` of the tokenizer.json beside the shards.
        vocab_size: number of token ids, sinks not counted.
        padded_vocab_size: rows of a model's embedding.
        sink_token_ids: ids kept for sinks; they occur in no shard.
        eos_token_id: ends every run of text in a split.
        dtype: of a token on disk, little-endian: "uint16" or "uint32".
        shards: in reading order within each split.
        splits: counts by split.
        source: the text, as the user named it.
        val_fraction: share of the pieces that was held out.
        request: what was asked for, as far as it decides the tokens; lets ``prepare`` know its own work.
    """

    tokenizer_sha256: str
    vocab_size: int
    padded_vocab_size: int
    sink_token_ids: tuple[int, ...]
    eos_token_id: int
    dtype: str
    shards: tuple[Shard, ...]
    splits: dict[str, SplitCounts]
    source: dict[str, Any]
    val_fraction: float
    request: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Hash of tokenizer and tokens, whatever the files are called and wherever they lie."""
        content = [
            self.tokenizer_sha256,
            *((shard.split, shard.tokens, shard.sha256) for shard in self.shards),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST_FILE, asdict(self))


def token_dtype(vocab_size: int) -> str:
    """Return the name of the smallest dtype on disk for this many ids."""
    return "uint16" if vocab_size <= LARGEST_UINT16_VOCABULARY else "uint32"


def little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of prepared shards.

    Raises:
        DataError: it is missing, is no manifest of shards, or was written by another version.
    """
    path = folder / MANIFEST_FILE
    if folder.is_file():
        raise DataError(
            f'{folder} is a file, and shards are a folder; make them of a text with "sinktrain prepare '
            f'{folder} --out DIR"'
        )
    if not path.is_file():
        raise DataError(
            f'{folder}: no prepared shards here; make them with "sinktrain prepare TEXT --out {folder}"'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return _manifest_of(content)
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path}: not a manifest of shards; {_AGAIN}") from None
    raise DataError(f"{path}: format_version {version}, but this sinktrain reads {FORMAT_VERSION}; {_AGAIN}")


class TokenSplit:
    """The tokens of one split as one long row, memory-mapped; opening reads none of them."""

    def __init__(self, folder: Path, split: str, shards: list[npt.NDArray[Any]]) -> None:
        self.folder = folder
        self.split = split
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenSplit:
        """Map the shards of "train" or "val".

        Raises:
            DataError: a shard is missing or has another size than its manifest says.
        """
        manifest = read_manifest(folder)
        dtype = little_endian(manifest.dtype)
        shards = [shard for shard in manifest.shards if shard.split == split]
        for shard in shards:
            check_size(folder, shard, manifest.dtype)
        return cls(folder, split, [np.memmap(folder / shard.file, dtype, mode="r") for shard in shards])

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    def read(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Return the ``length`` tokens from each start on, across the borders of shards.

        Args:
            starts: int64[rows].
            length: tokens of a row.

        Returns:
            int64[rows, length].
        """
        windows = np.empty((len(starts), length), dtype=np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            assert 0 <= start <= self.num_tokens - length, (
                f"tokens {start} to {start + length} of {self.num_tokens}"
            )
            self._read_into(window, start)
        return windows

    def _read_into(self, window: npt.NDArray[np.int64], start: int) -> None:
        filled = 0
        index = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(window):
            shard = self._shards[index]
            begin = start + filled - (int(self._ends[index]) - len(shard))
            part = shard[begin : begin + len(window) - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)
            index += 1

    def __reduce__(self) -> tuple[Callable[[Path, str], TokenSplit], tuple[Path, str]]:
        return TokenSplit.open, (self.folder, self.split)  # a worker process maps the files itself


class ShardWriter:
    """Appends the tokens of one split to its open part, and makes a shard of each part that is full."""

    def __init__(self, folder: Path, split: str, dtype: str, num_tokens: int, shards: list[Shard]) -> None:
        """Go on where ``num_tokens`` were written, some of them in finished ``shards`` (of any split).

        Raises:
            DataError: files are missing or too short.
        """
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shards = [shard for shard in shards if shard.split == split]
        self._open_tokens = num_tokens - sum(shard.tokens for shard in self.shards)
        self._file: BinaryIO | None = None
        self._restore()

    def append(self, ids: npt.NDArray[Any]) -> None:
        while len(ids):
            now, ids = np.split(ids, [SHARD_TOKENS - self._open_tokens])
            self._file = self._file or self._part.open("ab")
            self._file.write(now.astype(little_endian(self.dtype), copy=False).data)
            self._open_tokens += len(now)
            if self._open_tokens == SHARD_TOKENS:
                self.finish_shard()

    def finish_shard(self) -> None:
        """Give the open part, if there is one, the name of a shard."""
        self.close()
        if self._open_tokens:
            shard = Shard(self._name, self.split, self._open_tokens, sha256_file(self._part))
            os.replace(self._part, self.folder / shard.file)
            self.shards.append(shard)
            self._open_tokens = 0

    def flush(self) -> None:
        """Make sure that what was appended is on disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self.flush()
            self._file.close()
            self._file = None

    @property
    def _name(self) -> str:
        return f"tokens-{self.split}-{len(self.shards):05}.bin"

    @property
    def _part(self) -> Path:
        return self.folder / f".{self._name}.part"

    def _restore(self) -> None:
        """Bring the files back to what was counted: later tokens go, also those in later shards."""
        for shard in self.shards:
            check_size(self.folder, shard, self.dtype)
        if (self.folder / self._name).exists():
            os.replace(self.folder / self._name, self._part)
        kept = {self._part.name, *(shard.file for shard in self.shards)}
        for path in self.folder.glob(f"*tokens-{self.split}-*"):
            if path.name not in kept:
                path.unlink()
        expected = self._open_tokens * little_endian(self.dtype).itemsize
        if (self._part.stat().st_size if self._part.exists() else 0) < expected:
            raise DataError(
                f"{self._part}: tokens were lost; delete {self.folder} and prepare the text again"
            )
        if expected:
            os.truncate(self._part, expected)
        else:
            self._part.unlink(missing_ok=True)


def verify(folder: Path) -> Manifest:
    """Read every shard and the tokenizer again, and compare them with the manifest.

    Raises:
        DataError: at the first one that is missing, truncated or edited.
    """
    manifest = read_manifest(folder)
    itemsize = little_endian(manifest.dtype).itemsize
    total = sum(shard.tokens for shard in manifest.shards) * itemsize
    if load_tokenizer(str(folder)).sha256 != manifest.tokenizer_sha256:
        raise DataError(f"{folder / TOKENIZER_FILE}: not the tokenizer that made these shards; {_AGAIN}")
    with progress_bar(total=total, desc="verifying", unit="B", unit_scale=True) as bar:
        for shard in manifest.shards:
            check_size(folder, shard, manifest.dtype)
            if sha256_file(folder / shard.file) != shard.sha256:
                raise DataError(f"{folder / shard.file}: the shard was edited; {_AGAIN}")
            bar.update(shard.tokens * itemsize)
    return manifest


def check_size(folder: Path, shard: Shard, dtype: str) -> None:
    """Raise DataError if a shard is missing, or shorter or longer than it should be."""
    path = folder / shard.file
    if not path.is_file():
        raise DataError(f"{path}: the shard is missing; {_AGAIN}")
    size, expected = path.stat().st_size, shard.tokens * little_endian(dtype).itemsize
    if size != expected:
        raise DataError(
            f"{path}: the shard has {size} bytes, not {expected}; {_AGAIN}"
            f' (check the others with "sinktrain prepare --verify {folder}")'
        )


def _manifest_of(content: dict[str, Any]) -> Manifest:
    return Manifest(
        **content
        | {
            "sink_token_ids": tuple(content["sink_token_ids"]),
            "shards": tuple(Shard(**shard) for shard in content["shards"]),
            "splits": {split: SplitCounts(**content["splits"][split]) for split in SPLITS},
        }
    )
