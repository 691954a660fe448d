"""Endless text: a decoder and a tokenizer together."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

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
    **sampling: Any,
) -> Generator[str]:
    """Continue a prompt in one stream; yields once a token, text as soon as it is whole characters.

    An empty prompt starts a new document. Sampling as ``StreamingDecoder.generate``; sinks and the
    rows that only pad the vocabulary are never emitted.
    """
    prompt_ids = tokenizer.encode(prompt)
    fed = prompt_ids or [tokenizer.eos_token_id]
    for _, piece in _continue(decoder, tokenizer, fed, prompt_ids, max_tokens, **sampling):
        yield piece


class Dialogue:
    """A document whose lines are by turns a user's and the model's, in one stream that goes on.

    A base model, which knows no roles, answers a line with the line that follows it.

    Args:
        prompt: text in front of the first turn.
        max_tokens: of each reply; no limit when None.
        seed: makes the replies repeatable.
        sampling: as ``StreamingDecoder.generate`` takes it.
    """

    def __init__(
        self,
        decoder: StreamingDecoder,
        tokenizer: Tokenizer,
        prompt: str = "",
        max_tokens: int | None = None,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> None:
        self._decoder, self._tokenizer, self._max_tokens = decoder, tokenizer, max_tokens
        self._seed, self._sampling = seed, sampling
        self._unfed, self._ahead = list[int](), prompt  # what is fed before the next turn: ids, then text

    def reply(self, turn: str) -> Generator[str]:
        """Feed a line, given without its end, and stream the answer; yields once a token.

        A reply ends with its line, at an end of text, or after ``max_tokens``. What ends it is not
        shown, nor are blank lines before it; the stream holds all that was emitted.
        """
        turn_ids = self._tokenizer.encode(f"{self._ahead}{turn}\n")
        fed, seed, end_of_text = [*self._unfed, *turn_ids], self._seed, self._tokenizer.eos_token_id
        if seed is not None:
            self._seed = seed + 1  # else every reply would draw alike
        continuation = _continue(
            self._decoder,
            self._tokenizer,
            fed or [end_of_text],
            turn_ids,
            self._max_tokens,
            seed=seed,
            **self._sampling,
        )
        has_begun = False
        for token, piece in continuation:
            line, line_end, _ = (piece if has_begun else piece.lstrip()).partition("\n")
            has_begun = has_begun or line != ""
            is_last = line_end != "" or token == end_of_text
            self._unfed, self._ahead = [token], "" if is_last else "\n"
            yield "" if token == end_of_text else line
            if is_last:
                return


def _continue(
    decoder: StreamingDecoder,
    tokenizer: Tokenizer,
    fed: list[int],
    shown: list[int],
    max_tokens: int | None,
    **sampling: Any,
) -> Generator[tuple[int, str]]:
    """Feed ids and yield each token that follows, with the text that it completes.

    Args:
        shown: the ids whose text stands before; some tokenizers drop the first space where there is none.
    """
    unknown = range(tokenizer.vocab_size, decoder.model.config.vocab_size)
    pieces = DecodeStream(ids=shown, skip_special_tokens=False)
    for tokens in decoder.generate(torch.tensor([fed]), max_tokens, **sampling, suppress=unknown):
        token = int(tokens)
        yield token, pieces.step(tokenizer.backend, token) or ""
