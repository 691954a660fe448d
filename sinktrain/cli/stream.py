"""``sinktrain stream``: a model's endless text on stdout, or its replies to the lines of stdin."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import fields
from typing import Any

from sinktrain.cli.parsing import (
    MODEL_FORMS,
    add_device_options,
    add_revision_option,
    chosen_device,
    make_parser,
    number_of_tokens,
)
from sinktrain.errors import ConfigError, StreamError

STREAM_DESCRIPTION = """\
Continue a prompt for ever, in constant memory. Ctrl-C ends it.

With --turns it is a dialogue: each line of stdin goes on in the same stream, and the model's next line
is the reply; Ctrl-D ends it. A base model knows no roles, so a --prompt that shows how the lines go
helps. A reply ends with its line, at an end of text, or after --max-tokens, and is one line of stdout."""

MAX_REPLY_TOKENS = 200


def stream(arguments: list[str]) -> int:
    parser = make_parser(
        "stream",
        STREAM_DESCRIPTION,
        'sinktrain stream runs/quickstart/sink --prompt "Enter the KING" --max-tokens 500 --stats\n'
        "  sinktrain stream runs/quickstart/sink --turns --temperature 0.8 --min-p 0.05\n"
        "  sinktrain stream runs/quickstart/sink --turns < lines.txt > replies.txt",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_FORMS)
    add_revision_option(parser)
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="what to continue; - reads it from stdin"
    )
    parser.add_argument("--layout", metavar="S+W", help="sinks + window (default: half the trained length)")
    parser.add_argument("--turns", action="store_true", help="answer stdin line by line, in one stream")
    parser.add_argument(
        "--max-tokens",
        type=number_of_tokens,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"a number, or inf (default: inf; with --turns {MAX_REPLY_TOKENS}, for each reply)",
    )
    parser.add_argument("--stats", action="store_true", help="speed, cache, position and memory on stderr")
    add_device_options(parser, default_dtype="float32")
    group = parser.add_argument_group("sampling, as in transformers and in its order")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: less of what the cache still holds (default: 1, none)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0 takes the most probable token (default: 1)",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most probable tokens")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="keep the most probable tokens that hold P together"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least P times as probable as the best"
    )
    group.add_argument("--seed", type=int, metavar="N", help="repeats a text")
    options = parser.parse_args(arguments)
    if options.turns and options.prompt == "-":
        raise ConfigError("--prompt - and --turns both read stdin; write the prompt out: --prompt TEXT")
    _stream_to_stdout(options, _sampling(options))
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of ``Sampling`` and the seed, as typed and checked."""
    from sinktrain.streaming.sampling import Sampling

    settings = {field.name: getattr(options, field.name) for field in fields(Sampling)}
    try:
        Sampling(**settings)
    except StreamError as error:
        name, _, problem = str(error).partition(" ")
        raise ConfigError(f"--{name.replace('_', '-')} {problem}") from None
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed} is out of range; use 0 to {2**63 - 1}")
    return {**settings, "seed": options.seed}


def _stream_to_stdout(options: argparse.Namespace, sampling: dict[str, Any]) -> None:
    import torch

    from sinktrain.model.checkpoints import load_model
    from sinktrain.model.hub import at_revision
    from sinktrain.streaming.decoder import StreamingDecoder
    from sinktrain.streaming.layout import Layout, stream_layout
    from sinktrain.streaming.text import Dialogue, stream_text, tokenizer_of

    prompt = _prompt(options.prompt)
    source = at_revision(options.model, options.revision)
    model = load_model(source, chosen_device(options.device), getattr(torch, options.dtype))
    tokenizer = tokenizer_of(model.config, source)
    layout = Layout.parse(options.layout) if options.layout else stream_layout(model.config)
    decoder = StreamingDecoder(model, layout.sinks, layout.window)
    max_tokens = getattr(options, "max_tokens", MAX_REPLY_TOKENS if options.turns else None)
    texts: Iterator[Iterator[str]]
    if options.turns:
        texts = map(Dialogue(decoder, tokenizer, prompt, max_tokens, **sampling).reply, _stdin_lines())
    else:
        sys.stdout.write(prompt)
        texts = iter([stream_text(decoder, tokenizer, prompt, max_tokens, **sampling)])
    is_live = not (sys.stdout.isatty() or (options.turns and sys.stdin.isatty()))
    with closing(_with_stats(texts, decoder, is_live)) if options.stats else nullcontext(texts) as shown:
        for pieces in shown:
            try:
                for piece in pieces:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            finally:
                sys.stdout.write("\n")
            sys.stdout.flush()


def _prompt(given: str) -> str:
    """The prompt as typed, or all of stdin for ``-``."""
    try:
        if given == "-":
            return sys.stdin.buffer.read().decode()
        given.encode()  # what is not UTF-8 on a command line arrives as lone surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"--prompt is not UTF-8 at byte {error.start}; convert it first") from None
    return given


def _stdin_lines() -> Iterator[str]:
    """The lines of stdin as they come, without their ends; a terminal is asked for each."""
    is_terminal = sys.stdin.isatty()
    for number in itertools.count(1):
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = b""
        try:
            line = sys.stdin.buffer.readline()
        finally:
            if is_terminal and not line:  # Ctrl-D or Ctrl-C: what comes next starts a line
                print(file=sys.stderr)
        if not line:
            return
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"line {number} of stdin is not UTF-8 at byte {error.start}; convert it first"
            ) from None
        yield text.rstrip("\r\n")


def _with_stats(texts: Iterator[Iterator[str]], decoder: Any, is_live: bool) -> Generator[Iterator[str]]:
    """Show the speed, live if nothing else is written there, and in a line when it ends or is ended.

    What comes before the first token of a text, such as reading the prompt, is no part of it.
    """
    from sinktrain.progress import progress_bar

    num_tokens, num_timed, timed_s = 0, 0, 0.0

    def timed(pieces: Iterator[str]) -> Iterator[str]:
        nonlocal num_tokens, num_timed, timed_s
        shown_at = None
        for piece in pieces:
            num_tokens += 1
            bar.update()
            now = time.monotonic()
            if shown_at is not None:
                num_timed += 1
                timed_s += now - shown_at
            shown_at = now
            yield piece

    try:
        with progress_bar(unit="tok", desc=str(decoder.layout), disable=not is_live) as bar:
            yield from map(timed, texts)
    finally:
        print(
            f"{num_tokens:,} tokens, {num_timed / timed_s if num_timed else 0:,.1f} tokens/s, "
            f"layout {decoder.layout}, cache {decoder.cache_bytes:,} bytes, "
            f"stream position {int(decoder.stream_pos[0]):,}, {_peak_memory(decoder.model.device)}",
            file=sys.stderr,
        )


def _peak_memory(device: Any) -> str:
    """The most memory that this process has held, and the most that its tensors have on a CUDA device."""
    import resource

    import torch

    peak_mem_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak_mem_bytes *= 1024  # KiB there
    on_device = f", {torch.cuda.max_memory_allocated(device):,} on {device}" if device.type == "cuda" else ""
    return f"peak memory {peak_mem_bytes:,} bytes{on_device}"
