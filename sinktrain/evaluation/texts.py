"""Text to measure on, as the tokens of a model's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinktrain.data.shards import TokenSplit, read_manifest
from sinktrain.data.sources import Source, documents, is_shards
from sinktrain.data.tokenizer import Tokenizer, load_tokenizer
from sinktrain.errors import DataError, ModelError
from sinktrain.model.checkpoints import find_tokenizer, require_tokenizer
from sinktrain.model.neox import GPTNeoX


@dataclass(frozen=True)
class TokenizedText:
    """Tokens of a text, and what they were made with.

    Args:
        tokens: int64[num_tokens].
        vocabulary: sha256 of the tokenizer; models of one vocabulary can be paired.
        tokenizer: None when the tokens came from shards and the model has none.
    """

    tokens: NDArray[np.int64]
    vocabulary: str
    tokenizer: Tokenizer | None

    def num_bytes(self, tokens: NDArray[np.int64]) -> int | None:
        """UTF-8 bytes that some tokens stand for, or None without a tokenizer."""
        return None if self.tokenizer is None else len(self.tokenizer.decode(tokens.tolist()).encode())


def tokenize_for(model: GPTNeoX, model_source: str, text: Source, max_tokens: int) -> TokenizedText:
    """The first tokens of a text for a model; of shards, their held-out split.

    Raises:
        DataError: the text cannot be read, or the shards are of another tokenizer.
        ModelError: a text needs a tokenizer and the model has none.
    """
    if is_shards(text.location):
        return _from_shards(model, model_source, Path(text.location), max_tokens)
    tokenizer = load_tokenizer(str(require_tokenizer(model_source)))
    tokens: list[int] = []
    for document in documents(text):
        tokens += [*tokenizer.encode(document), tokenizer.eos_token_id]
        if len(tokens) >= max_tokens:
            break
    return TokenizedText(np.array(tokens[:max_tokens]), tokenizer.sha256, tokenizer)


def _from_shards(model: GPTNeoX, model_source: str, folder: Path, max_tokens: int) -> TokenizedText:
    manifest = read_manifest(folder)
    found = find_tokenizer(model_source)
    tokenizer = load_tokenizer(str(found or folder))
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(f"{folder}: these shards were not made with the tokenizer of {model_source}; prepare the text again with --tokenizer {model_source}")
    if manifest.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"{model_source} has {model.config.vocab_size} vocabulary rows, the shards {folder} use "
            f"{manifest.vocab_size}; they belong to another model"
        )
    held_out = TokenSplit.open(folder, "val")
    length = min(max_tokens, held_out.num_tokens)
    tokens = held_out.read(np.zeros(1, dtype=np.int64), length)[0]
    return TokenizedText(tokens, manifest.tokenizer_sha256, tokenizer)
