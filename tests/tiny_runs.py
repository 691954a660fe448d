"""Run folders with a tokenizer, and a text for them: what the commands that need words are tried on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tiny_models import tiny_model, write_run

from sinktrain.data.tokenizer import Tokenizer, train_tokenizer
from sinktrain.model.config import SinkConfig

LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "A few words, then some more of them.",
    "So it goes.",
)
TEXT = "\n".join(LINES[number % 3] + f" {number}" for number in range(24)) + "\n"
TRAINED_LENGTH = 32


@cache
def tiny_tokenizer(text: str = TEXT) -> Tokenizer:
    return train_tokenizer(iter([text]), 280)


def write_text_run(
    folder: Path, num_sinks: int = 0, tokenizer: Tokenizer | None = None, seed: int = 0, **changes: Any
) -> Path:
    """A run of random weights, trained on 32 positions, with the tokenizer's own sinks."""
    tokenizer = tokenizer or tiny_tokenizer()
    ids = tokenizer.sink_token_ids[:num_sinks]
    sink = SinkConfig("token", num_sinks, ids) if num_sinks else SinkConfig()
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "max_position_embeddings": TRAINED_LENGTH}
    write_run(tiny_model(sink=sink, seed=seed, **sizes | changes), folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder
