"""``sinktrain prepare``: text to a tokenizer and verified token shards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sinktrain.cli.parsing import add_source_options, make_parser, number_of_tokens, text_source
from sinktrain.cli.printing import print_json
from sinktrain.errors import ConfigError


def prepare(arguments: list[str]) -> int:
    parser = make_parser(
        "prepare",
        "Turn a text into a tokenizer and verified token shards. Cut off, the same command continues.",
        "sinktrain prepare book.txt --out shards --vocab-size 4096\n"
        "  sinktrain prepare monology/pile-uncopyrighted --tokenizer EleutherAI/pythia-160m --out shards\n"
        "  sinktrain prepare books/ --out shards --streameval-share 0.1\n"
        "  sinktrain prepare --verify shards",
    )
    parser.add_argument(
        "text",
        nargs="?",
        metavar="TEXT",
        help="file, folder or Hub dataset id; in a .txt, lines that say <|doc|> stand between documents",
    )
    parser.add_argument("--out", type=Path, help="folder for the shards")
    parser.add_argument(
        "--tokenizer", metavar="NAME_OR_DIR", help="a Hugging Face tokenizer; otherwise one is trained"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the trained tokenizer's vocabulary, sinks included",
    )
    parser.add_argument("--val-fraction", type=float, metavar="F", help="share of the text that is held out")
    parser.add_argument(
        "--streameval-share",
        type=float,
        default=0.0,
        metavar="F",
        help="mix lines like StreamEval's into the training text until they are this share of it, up to 0.5, "
        "so that a small model learns the format of the test (default: 0)",
    )
    parser.add_argument("--max-tokens", type=number_of_tokens, metavar="N", help="stop after so many tokens")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check the hashes of shards and stop")
    add_source_options(parser)
    options = parser.parse_args(arguments)
    from sinktrain.data import prepare as preparing
    from sinktrain.data import shards

    if options.verify is not None:
        _print_manifest(shards.verify(options.verify), options.verify, options.json)
        return 0
    if options.text is None or options.out is None:
        raise ConfigError("say what to prepare and where to: sinktrain prepare TEXT --out DIR")
    manifest = preparing.prepare(
        preparing.PrepareOptions(
            source=text_source(options.text, options),
            out=options.out,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            val_fraction=options.val_fraction,
            max_tokens=options.max_tokens,
            streameval_share=options.streameval_share or None,
            workers=options.workers,
        )
    )
    _print_manifest(manifest, options.out, options.json)
    return 0


def _print_manifest(manifest: Any, folder: Path, as_json: bool) -> None:
    if as_json:
        print_json(asdict(manifest))
        return
    train, val = manifest.splits["train"], manifest.splits["val"]
    print(
        f"{folder}: {train.tokens:,} training and {val.tokens:,} held-out tokens, vocabulary of "
        f"{manifest.vocab_size:,} padded to {manifest.padded_vocab_size:,}"
    )
