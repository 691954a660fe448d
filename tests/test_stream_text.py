"""Streamed text is whole characters, continues its prompt, and never shows a sink or a padding row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
import torch
from tiny_runs import TEXT, tiny_tokenizer, write_text_run
from tokenizers import decoders, models

from sinktrain.data.tokenizer import Tokenizer, train_tokenizer
from sinktrain.errors import StreamError
from sinktrain.model.checkpoints import load_model
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.text import stream_text

WORDS = "naïve 日本語 🙂"


class Script:
    """A decoder that emits given tokens, whatever it is fed."""

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        self.tokens = tokens
        self.prompt: list[int] = []
        self.suppressed: set[int] = set()
        self.model = type("Model", (), {"config": type("Config", (), {"vocab_size": vocab_size})})

    def generate(
        self, prompt: torch.Tensor, max_tokens: int | None, **options: Any
    ) -> Iterator[torch.Tensor]:
        self.prompt, self.suppressed = prompt[0].tolist(), set(options["suppress"])
        return (torch.tensor([token]) for token in self.tokens[:max_tokens])


def pieces_of(
    tokens: list[int], tokenizer: Tokenizer, prompt: str = "", max_tokens: int | None = None
) -> list[str]:
    script = cast(StreamingDecoder, Script(tokens, tokenizer.padded_vocab_size))
    return list(stream_text(script, tokenizer, prompt, max_tokens))


@pytest.fixture(scope="module")
def bytes_only() -> Tokenizer:
    """A tokenizer without merges of the words: a token a byte."""
    tokenizer = train_tokenizer(iter(["x"]), 266)
    assert len(tokenizer.encode(WORDS)) == len(WORDS.encode())
    return tokenizer


def test_characters_cut_over_tokens_come_out_whole(bytes_only: Tokenizer) -> None:
    pieces = pieces_of(bytes_only.encode(WORDS), bytes_only, "ein 日")
    assert len(pieces) == len(WORDS.encode())
    assert [piece for piece in pieces if piece] == list(WORDS)


def test_what_is_half_a_character_at_the_end_is_not_shown(bytes_only: Tokenizer) -> None:
    tokens = bytes_only.encode(WORDS)
    for num_tokens in range(len(tokens) + 1):
        shown = "".join(pieces_of(tokens, bytes_only, max_tokens=num_tokens))
        assert shown == WORDS.encode()[:num_tokens].decode(errors="ignore")


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(bytes_only: Tokenizer) -> None:
    first_of_three = bytes_only.encode("日")[0]
    shown = "".join(pieces_of([first_of_three, *bytes_only.encode(WORDS)], bytes_only))
    assert shown == "\ufffd" + WORDS


def test_any_tokens_come_out_as_they_are_decoded(bytes_only: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        drawn = torch.randint(bytes_only.vocab_size, (40,), generator=generator).tolist()
        tokens = [*drawn, *bytes_only.encode(" end")]
        assert "".join(pieces_of(tokens, bytes_only)) == bytes_only.decode(tokens)


def test_a_first_space_is_kept_after_a_prompt() -> None:
    """Decoders of the SentencePiece kind drop a text's first space; this is not its first."""
    backend = tokenizers.Tokenizer(models.WordLevel({"▁so": 0, "▁it": 1, "</s>": 2}, unk_token="</s>"))
    backend.decoder = decoders.Metaspace()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer = Tokenizer(json.loads(backend.to_str()))
    assert pieces_of([1, 0], tokenizer, "so") == [" it", " so"]
    assert pieces_of([1, 0], tokenizer) == ["it", " so"]


def test_a_prompt_is_fed_as_it_is_and_none_starts_a_document() -> None:
    tokenizer = tiny_tokenizer()
    script = Script([], tokenizer.padded_vocab_size)
    for prompt, fed in (("So it goes.", tokenizer.encode("So it goes.")), ("", [tokenizer.eos_token_id])):
        list(stream_text(cast(StreamingDecoder, script), tokenizer, prompt))
        assert script.prompt == fed


def test_end_of_text_is_written_out() -> None:
    tokenizer = tiny_tokenizer()
    assert pieces_of([tokenizer.eos_token_id], tokenizer) == [tokenizer.eos_token]


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_sinks_and_padding_rows_are_never_emitted(
    num_sinks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows beyond the tokenizer get the largest logits, and still none of them is drawn."""
    tokenizer = tiny_tokenizer()
    model = load_model(write_text_run(tmp_path / "run", num_sinks))
    logits = model.logits

    def preferring_padding(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        found[..., tokenizer.vocab_size :] += 100
        return found

    monkeypatch.setattr(model, "logits", preferring_padding)
    emitted: list[int] = []
    decoder = StreamingDecoder(model, 1, 8)
    generate = decoder.generate

    def recorded(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for token in generate(*arguments, **options):
            emitted.append(int(token))
            yield token

    monkeypatch.setattr(decoder, "generate", recorded)
    list(stream_text(decoder, tokenizer, "So", 60, seed=1))
    assert len(emitted) == 60
    assert max(emitted) < tokenizer.vocab_size
    assert not set(emitted) & set(model.sink_ids)


def test_a_seed_repeats_the_text_and_no_temperature_needs_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = load_model(write_text_run(tmp_path / "run", num_sinks=1))

    def text(**options: Any) -> str:
        return "".join(stream_text(StreamingDecoder(model, 1, 15), tokenizer, TEXT[:20], 40, **options))

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text(temperature=0.0) == text(temperature=0.0) == text(top_k=1)


def test_settings_that_cannot_be_sampled_with_are_refused(tmp_path: Path) -> None:
    decoder = StreamingDecoder(load_model(write_text_run(tmp_path / "run")), 0, 16)
    with pytest.raises(StreamError, match="top_p is 2"):
        next(stream_text(decoder, tiny_tokenizer(), "So", top_p=2.0))
