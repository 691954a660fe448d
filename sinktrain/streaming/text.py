"""Endless text: a decoder and a tokenizer together."""

from __future__ import annotations

from collections.abc import Generator

import torch
from tokenizers.decoders import DecodeStream

from sinktrain.data.tokenizer import Tokenizer, load_tokenizer
from sinktrain.errors import ModelError
from sinktrain.model.checkpoints import require_tokenizer
from sinktrain.model.config import ModelConfig
from sinktrain.streaming.decoder import StreamingDecoder


def tokenizer_of(config: ModelConfig, source: str) -> Tokenizer:
    """The tokenizer that a model came with.

    Raises:
        ModelError: it came without one, or with one that has more ids than the model has rows.
        DataError: it cannot be used.
    """
    folder = require_tokenizer(source)
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{source} has {config.vocab_size} vocabulary rows, its tokenizer {tokenizer.vocab_size} ids; "
            f"put the tokenizer.json of its training into {folder}"
        )
    return tokenizer


def stream_text(
    decoder: StreamingDecoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Generator[str]:
    """Continue a prompt in one stream; yields once a token, text as soon as it is whole characters.

    An empty prompt starts a new document. Sampling as ``StreamingDecoder.generate``; sinks and the
    rows that only pad the vocabulary are never emitted.
    """
    prompt_ids = tokenizer.encode(prompt)
    unknown = range(tokenizer.vocab_size, decoder.model.config.vocab_size)
    # It knows the prompt, because some tokenizers drop a text's first space.
    pieces = DecodeStream(ids=prompt_ids, skip_special_tokens=False)
    tokens = decoder.generate(
        torch.tensor([prompt_ids or [tokenizer.eos_token_id]]),
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        suppress=unknown,
    )
    for token in tokens:
        piece = pieces.step(tokenizer.backend, int(token))
        yield piece or ""
