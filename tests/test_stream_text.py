"""Streamed text is whole characters, continues its prompt, and never shows a sink or a padding row."""

from __future__ import annotations

import itertools
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
from sinktrain.streaming.text import Dialogue, stream_text

WORDS = "naïve 日本語 🙂"


class Script:
    """A decoder that emits given tokens, whatever it is fed: the same each time, or a list for each."""

    def __init__(self, tokenizer: Tokenizer, *replies: list[int]) -> None:
        self.replies = itertools.cycle(replies)
        self.prompts: list[list[int]] = []
        self.options: list[dict[str, Any]] = []
        config = type("Config", (), {"vocab_size": tokenizer.padded_vocab_size})
        self.model = type("Model", (), {"config": config})

    def generate(
        self, prompt: torch.Tensor, max_tokens: int | None, **options: Any
    ) -> Iterator[torch.Tensor]:
        self.prompts.append(prompt[0].tolist())
        self.options.append(options)
        return (torch.tensor([token]) for token in next(self.replies)[:max_tokens])


def pieces_of(
    tokens: list[int], tokenizer: Tokenizer, prompt: str = "", max_tokens: int | None = None
) -> list[str]:
    script = cast(StreamingDecoder, Script(tokenizer, tokens))
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
    script = Script(tokenizer, [])
    for prompt in ("So it goes.", ""):
        list(stream_text(cast(StreamingDecoder, script), tokenizer, prompt))
    assert script.prompts == [tokenizer.encode("So it goes."), [tokenizer.eos_token_id]]


def test_every_setting_of_sampling_reaches_the_decoder() -> None:
    tokenizer = tiny_tokenizer()
    settings = {
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 7,
    }
    script = Script(tokenizer, [])
    decoder = cast(StreamingDecoder, script)
    list(stream_text(decoder, tokenizer, "So", **settings))
    list(Dialogue(decoder, tokenizer, **settings).reply("So"))
    for given in script.options:
        assert set(given.pop("suppress")) == set(range(tokenizer.vocab_size, tokenizer.padded_vocab_size))
        assert given == settings


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


# -- dialogues ------------------------------------------------------------------------------------


def dialogue_of(
    tokenizer: Tokenizer, *said: list[int], prompt: str = "", max_tokens: int | None = None
) -> tuple[Dialogue, Script]:
    script = Script(tokenizer, *said)
    return Dialogue(cast(StreamingDecoder, script), tokenizer, prompt, max_tokens), script


def test_a_reply_ends_with_its_line_and_the_next_turn_follows_it(bytes_only: Tokenizer) -> None:
    encode = bytes_only.encode
    dialogue, script = dialogue_of(bytes_only, encode(f"{WORDS}\nnever"), encode("no\n"), prompt="Q\n")
    assert "".join(dialogue.reply("Who?")) == WORDS
    assert "".join(dialogue.reply("日")) == "no"
    assert script.prompts == [encode("Q\nWho?\n"), encode("\n日\n")]


def test_a_reply_ends_with_the_text_and_the_next_turn_starts_a_document(bytes_only: Tokenizer) -> None:
    end, encode = bytes_only.eos_token_id, bytes_only.encode
    dialogue, script = dialogue_of(bytes_only, [*encode("yes"), end, *encode("never")], [end])
    assert list(dialogue.reply("Who?")) == ["y", "e", "s", ""]
    assert list(dialogue.reply("Why?")) == [""]
    assert script.prompts[1] == [end, *encode("Why?\n")]


def test_a_reply_that_is_cut_off_is_ended_before_the_next_turn(bytes_only: Tokenizer) -> None:
    encode = bytes_only.encode
    dialogue, script = dialogue_of(bytes_only, encode("one two"), max_tokens=5)
    assert "".join(dialogue.reply("Who?")) == "one t"
    assert next(dialogue.reply("Why?")) == "o"  # the caller has seen enough
    list(dialogue.reply(""))
    assert script.prompts[1:] == [encode("t\nWhy?\n"), encode("o\n\n")]


def test_blank_lines_before_a_reply_are_passed_over(bytes_only: Tokenizer) -> None:
    dialogue, _ = dialogue_of(bytes_only, bytes_only.encode("\n \n  日 \nnever"))
    assert "".join(dialogue.reply("Who?")) == "日 "


def test_a_token_that_goes_on_after_its_line_is_shown_to_the_line_and_fed_whole() -> None:
    words = {"so": 0, ".\nnever": 1, "</s>": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.Split("|", "removed"), decoders.Fuse()
    tokenizer = Tokenizer(json.loads(backend.to_str()))
    dialogue, script = dialogue_of(tokenizer, [0, 1, 0])
    assert "".join(dialogue.reply("so")) == "so."
    list(dialogue.reply("so"))
    assert script.prompts[1][0] == 1


def test_each_reply_has_a_seed_of_its_own() -> None:
    tokenizer = tiny_tokenizer()
    script = Script(tokenizer, [])
    dialogue = Dialogue(cast(StreamingDecoder, script), tokenizer, seed=3)
    for _ in range(3):
        list(dialogue.reply("So"))
    assert [options["seed"] for options in script.options] == [3, 4, 5]


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_a_dialogue_is_one_stream_that_starts_with_the_sinks_once(
    num_sinks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three turns, through two wraps, leave the decoder where feeding the whole document leaves it."""
    tokenizer = tiny_tokenizer()
    model = load_model(write_text_run(tmp_path / "run", num_sinks), dtype=torch.float64)
    decoder, whole = (StreamingDecoder(model, num_sinks, 16) for _ in range(2))
    generate = decoder.generate
    document = [*model.sink_ids]

    def recorded(tokens: torch.Tensor, *arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        document.extend(tokens[0].tolist())
        for emitted, token in enumerate(generate(tokens, *arguments, **options), start=1):
            yield token
            if emitted < 7:
                document.append(int(token))

    monkeypatch.setattr(decoder, "generate", recorded)
    # No line ends and no end of text are drawn, so that every reply has 7 tokens.
    logits, ends = model.logits, [*tokenizer.encode("\n"), tokenizer.eos_token_id]
    monkeypatch.setattr(
        model, "logits", lambda hidden: logits(hidden).index_fill(-1, torch.tensor(ends), -99)
    )
    dialogue = Dialogue(decoder, tokenizer, max_tokens=7, seed=1)
    for turn in ("So it goes.", "", "A few words"):
        list(dialogue.reply(turn))
    assert decoder.stream_pos.tolist() == [len(document)]
    whole.prefill(torch.tensor([document]))
    difference = decoder.step(torch.tensor([5])) - whole.step(torch.tensor([5]))
    assert difference.abs().max() < 1e-10
