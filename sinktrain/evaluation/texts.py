"""Text to measure on, as the tokens of a model's own tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinktrain.data.shards import TokenSplit, read_manifest
from sinktrain.data.sources import Source, documents, is_shards, pieces
from sinktrain.data.tokenizer import Tokenizer, load_tokenizer
from sinktrain.errors import DataError, ModelError
from sinktrain.model.checkpoints import find_tokenizer
from sinktrain.model.config import ModelConfig
from sinktrain.streaming.text import tokenizer_of

PIECE_BYTES = 1 << 20
"""Of a long document, tokenised at once: a book need not be read to its end for its first tokens."""


@dataclass(frozen=True)
class TokenizedText:
    """Tokens of a text, and what they were made with.

    Args:
        tokens: int64[num_tokens].
        tokenizer: models of one ``tokenizer.sha256`` can be paired.
    """

    tokens: NDArray[np.int64]
    tokenizer: Tokenizer

    def num_bytes(self, tokens: NDArray[np.int64]) -> int:
        """UTF-8 bytes of text that some tokens stand for; end-of-text tokens stand for none."""
        of_text = tokens[tokens != self.tokenizer.eos_token_id]
        return len(self.tokenizer.decode(of_text.tolist()).encode())

    def num_documents(self, tokens: NDArray[np.int64], is_scored: NDArray[np.bool_]) -> int:
        """Documents that the scored ones of some tokens, in the order of the text, come from."""
        is_end = tokens.ravel() == self.tokenizer.eos_token_id
        document = np.cumsum(is_end) - is_end
        return len(np.unique(document[is_scored.ravel()]))


def tokenize_for(
    config: ModelConfig, model_source: str, text: Source, max_tokens: int | None = None
) -> TokenizedText:
    """The first tokens of a text for a model, or all of them; of shards, their held-out split.

    Raises:
        DataError: the text cannot be read, or the shards are of another tokenizer.
        ModelError: a text needs a tokenizer and the model has none, or one of another model.
    """
    if is_shards(text.location):
        return _from_shards(config, model_source, text, max_tokens)
    tokenizer = tokenizer_of(config, model_source)
    ids = itertools.chain.from_iterable(_encoded(tokenizer, text))
    return TokenizedText(np.fromiter(itertools.islice(ids, max_tokens), dtype=np.int64), tokenizer)


def _encoded(tokenizer: Tokenizer, text: Source) -> Iterator[list[int]]:
    for document in documents(text):
        for piece in pieces(document, PIECE_BYTES):
            yield tokenizer.encode(piece)
        yield [tokenizer.eos_token_id]


def _from_shards(
    config: ModelConfig, model_source: str, text: Source, max_tokens: int | None
) -> TokenizedText:
    if text != Source(text.location):
        raise DataError(
            f"{text.location}: --text-column, --subset, --split and --revision are not for prepared shards, "
            "whose held-out split is scored; leave them out"
        )
    folder = Path(text.location).expanduser()
    manifest = read_manifest(folder)
    found = find_tokenizer(model_source)
    tokenizer = load_tokenizer(str(found or folder))
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder}: these shards were not made with the tokenizer of {found or folder}; "
            f"prepare the text again with --tokenizer {found or folder}"
        )
    if manifest.vocab_size > config.vocab_size:
        raise ModelError(
            f"{model_source} has {config.vocab_size} vocabulary rows, the shards {folder} use "
            f"{manifest.vocab_size}; they belong to another model"
        )
    held_out = TokenSplit.open(folder, "val")
    length = held_out.num_tokens if max_tokens is None else min(max_tokens, held_out.num_tokens)
    tokens = held_out.read(np.zeros(1, dtype=np.int64), length)[0]
    if tokens.max() >= manifest.vocab_size:
        raise DataError(
            f"{folder}: a shard was edited: it holds token {tokens.max()} of a vocabulary of "
            f"{manifest.vocab_size}; prepare the text again into another folder"
        )
    return TokenizedText(tokens, tokenizer)
