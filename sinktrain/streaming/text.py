"""Endless text: a decoder and a tokenizer together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tokenizers.decoders import DecodeStream

from sinktrain.data.tokenizer import Tokenizer
from sinktrain.streaming.decoder import StreamingDecoder


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
) -> Iterator[str]:
    """Continue a prompt in one stream; yields text as soon as it is whole characters.

    An empty prompt starts a new document. Sampling as ``StreamingDecoder.generate``; sinks and the
    rows that only pad the vocabulary are never emitted.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    unknown = range(tokenizer.vocab_size, decoder.model.config.vocab_size)
    pieces = DecodeStream(skip_special_tokens=False)
    tokens = decoder.generate(
        torch.tensor([ids]),
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
