"""Tokenizers: trained on the text or taken from Hugging Face, with room kept for sink tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sinktrain.data.hub import snapshot
from sinktrain.errors import DataError, did_you_mean, first_line
from sinktrain.files import write_json, write_text

RESERVED_SINKS = 8
VOCAB_MULTIPLE = 128
END_OF_TEXT = "<|endoftext|>"
KNOWN_END_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
NUM_BYTES = 256
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Old formats, which transformers converts. (Where there is none of these it makes an empty tokenizer.)
VOCABULARY_FILES = ("vocab.json", "vocab.txt", "*.model")
HUB_FILES = [*VOCABULARY_FILES, "tokenizer*.json", "special_tokens_map.json", "merges.txt", "config.json"]


def sink_token_name(index: int) -> str:
    """Return the name of sink number ``index``: ``<|sink|>``, ``<|sink_1|>``, …"""
    return f"<|sink_{index}|>" if index else "<|sink|>"


SINK_TOKENS = tuple(map(sink_token_name, range(RESERVED_SINKS)))


class Tokenizer:
    """The plain tokenizer of a text: no sinks, and nothing added to what it encodes.

    An exported tokenizer, which prepends sinks, becomes the plain one that it was made from, so that both
    forms have one ``sha256`` and one ``vocab_size``.
    """

    def __init__(self, definition: dict[str, Any], eos_token: str | None = None) -> None:
        """Take the content of a tokenizer.json, and the end-of-text token where it is known.

        Raises:
            DataError: the tokenizer has no end-of-text token.
        """
        self._definition = _plain(definition)
        self.backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._definition))
        self.backend.encode_special_tokens = True  # a text that mentions <|endoftext|> is still text
        self._vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.eos_token = self._choose_eos(eos_token)

    @classmethod
    def from_file(cls, path: Path, eos_token: str | None = None) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            DataError: the file is missing, is no tokenizer, or has no end-of-text token.
        """
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), eos_token)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # tokenizers raises a bare Exception
            raise DataError(f"{path}: not a tokenizer: {first_line(error)}") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest one plus 1, added tokens included, sinks not."""
        return max(self._vocab.values()) + 1

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the model's embedding: room for the sinks, rounded up for speed."""
        return -(-(self.vocab_size + RESERVED_SINKS) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def sink_token_ids(self) -> tuple[int, ...]:
        """The ids kept for sinks, in every arm alike: those after the last one of the tokenizer."""
        return tuple(range(self.vocab_size, self.vocab_size + RESERVED_SINKS))

    @property
    def eos_token_id(self) -> int:
        return self._vocab[self.eos_token]

    @cached_property
    def sha256(self) -> str:
        """Hash of what the tokenizer does, whatever the layout of its file."""
        canonical = json.dumps(_without_defaults(self._definition), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens written out; sink ids have no text."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, and beside it the name of an end-of-text token that is not usual."""
        if self.eos_token != next((token for token in KNOWN_END_OF_TEXT if token in self._vocab), None):
            write_json(path.with_name(CONFIG_FILE), {"eos_token": self.eos_token})
        write_text(path, self.backend.to_str(pretty=True))

    def with_sinks(self, count: int) -> tokenizers.Tokenizer:
        """Return a tokenizer which puts ``count`` sinks in front of what it encodes, exactly once."""
        backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._definition))
        if count == 0:
            return backend
        names = SINK_TOKENS[:count]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        ids = tuple(backend.token_to_id(name) for name in names)
        assert ids == self.sink_token_ids[:count], f"{names} got the ids {ids}"
        backend.post_processor = processors.TemplateProcessing(
            single=[*names, "$A"],
            pair=[*names, "$A", "$B"],
            special_tokens=list(zip(names, ids, strict=True)),
        )
        return backend

    def _choose_eos(self, eos_token: str | None) -> str:
        wanted = (eos_token,) if eos_token else KNOWN_END_OF_TEXT
        for token in wanted:
            if token in self._vocab:
                return token
        raise DataError(f"the tokenizer has no end-of-text token; looked for {', '.join(wanted)}")


def load_tokenizer(name_or_dir: str) -> Tokenizer:
    """Load a tokenizer from a folder (shards, run, Hugging Face), a tokenizer.json, or the Hub.

    Raises:
        DataError: there is none, or it cannot be used.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_file():
        return Tokenizer.from_file(path, _configured_eos(path.parent))
    if path.is_dir():
        return _from_folder(path, name_or_dir)
    if name_or_dir.startswith((".", "/", "~")) or path.suffix == ".json":
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such tokenizer{did_you_mean(path.name, siblings)}")
    return _from_folder(snapshot(name_or_dir, HUB_FILES, DataError), name_or_dir)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE as GPT-NeoX has it; a small text may give fewer entries than asked for.

    Args:
        texts: to learn from.
        vocab_size: rows of the model's vocabulary, ``RESERVED_SINKS`` of them for sinks.

    Raises:
        DataError: ``vocab_size`` has no room for the bytes, the end-of-text token and the sinks.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - RESERVED_SINKS,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(json.loads(backend.to_str()), END_OF_TEXT)


def check_vocab_size(vocab_size: int) -> None:
    """Raise DataError if ``vocab_size`` leaves no room for a single merge."""
    smallest = NUM_BYTES + 1 + RESERVED_SINKS + 1
    if vocab_size < smallest:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: {NUM_BYTES} bytes, the end-of-text token and"
            f" {RESERVED_SINKS} sinks come first; use {smallest} or more"
        )


def _from_folder(folder: Path, name: str) -> Tokenizer:
    if (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.from_file(folder / TOKENIZER_FILE, _configured_eos(folder))
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        raise DataError(f"{name}: no {TOKENIZER_FILE} in this folder")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(folder)
        definition = json.loads(converted.backend_tokenizer.to_str())
    except Exception as error:  # every old format fails in its own way
        raise DataError(
            f"{name}: no {TOKENIZER_FILE}, and transformers cannot make one: {first_line(error)}"
        ) from error
    return Tokenizer(definition, converted.eos_token)


def _configured_eos(folder: Path) -> str | None:
    """Return the end-of-text token that a Hugging Face folder names, as a string or as an AddedToken."""
    for name in (CONFIG_FILE, "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError):
            raise DataError(f"{path}: not a JSON object") from None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _plain(definition: dict[str, Any]) -> dict[str, Any]:
    """Take away what adds to, cuts or fills up an encoding: post-processor, sinks, truncation, padding."""
    kept = [token for token in definition.get("added_tokens", []) if token["content"] not in SINK_TOKENS]
    return definition | {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}


def _without_defaults(value: Any) -> Any:
    """Drop null and false fields, which a later version of ``tokenizers`` may add."""
    if isinstance(value, dict):
        return {
            key: _without_defaults(entry)
            for key, entry in value.items()
            if entry is not None and entry is not False
        }
    return [_without_defaults(entry) for entry in value] if isinstance(value, list) else value
