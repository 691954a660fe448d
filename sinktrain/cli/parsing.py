"""What commands have in common: the parser, options that several take, and what is made of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from sinktrain.errors import ConfigError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

    from sinktrain.data.sources import Source

MODEL_FORMS = "run folder, .ckpt file, Hugging Face folder, or ORG/NAME or ORG/NAME@REVISION of the Hub"
DTYPES = ["float32", "float64", "bfloat16", "float16"]
WRITTEN_DTYPES = ["float32", "bfloat16", "float16"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        hint = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        raise ConfigError(f"{message}{hint}; see {self.prog} --help")


def make_parser(command: str, description: str, example: str) -> Parser:
    parser = Parser(
        prog=f"sinktrain {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command != "stream":
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of the text")
    group.add_argument(
        "--text-column", metavar="C", help="column of .jsonl, .parquet and Hub datasets (text)"
    )
    group.add_argument("--subset", metavar="NAME", help="of a Hub dataset")
    group.add_argument("--split", metavar="S", default="train", help="of a Hub dataset (train)")
    group.add_argument("--revision", metavar="R", help="of a Hub dataset (of a model: ORG/NAME@R)")


def add_revision_option(parser: argparse.ArgumentParser) -> None:
    """``--revision`` of the one MODEL of a command; see ``at_revision``."""
    parser.add_argument("--revision", metavar="R", help="of a Hub id, the same as ORG/NAME@R")


def add_device_options(parser: argparse.ArgumentParser, default_dtype: str | None) -> None:
    """``--device`` and ``--dtype``; a default of None goes by the device, see ``chosen_dtype``."""
    default = default_dtype or "float32 on the CPU, bfloat16 on CUDA"
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", default=default_dtype, choices=DTYPES, help=f"of the weights (default: {default})"
    )


def add_rounding_option(parser: argparse.ArgumentParser) -> None:
    """``--dtype`` of commands that write weights; see ``publishing.export``."""
    parser.add_argument(
        "--dtype", default="float32", choices=WRITTEN_DTYPES, help="round weights to it (default: float32)"
    )


def number_of_tokens(text: str) -> int | None:
    """A number of tokens; None for ``inf``."""
    return None if text == "inf" else _number(text, 1, "tokens", "use 1 or more, or inf")


def number_from(smallest: int, of: str) -> Callable[[str], int]:
    """What reads a number of these things."""
    return lambda text: _number(text, smallest, of, f"use {smallest} or more")


def _number(text: str, smallest: int, of: str, remedy: str) -> int:
    try:
        number = int(text.replace("_", ""))
    except ValueError:
        number = -1
    if number < smallest:
        raise argparse.ArgumentTypeError(f"{text} is not a number of {of}; {remedy}")
    return number


def number_list(option: str, typed: str) -> list[int]:
    """``1,32`` as numbers from 1 on."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", typed):
        raise ConfigError(f"{option} {typed} is not a list of numbers from 1 on; write it like 1,32")
    return [int(number) for number in typed.split(",")]


def names_of(option: str, typed: str, known: Sequence[str], alone: str | None = None) -> tuple[str, ...]:
    """``a,b`` as names, each once; nothing for the word ``alone``, which goes with no other."""
    names = tuple(dict.fromkeys(typed.split(",")))
    if alone in names:
        if len(names) > 1:
            raise ConfigError(f"{option} {typed}: {alone} stands alone; leave it or the others out")
        return ()
    words = [*known] if alone is None else [*known, alone]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, words)
            raise ConfigError(f'{option} "{name}" is not one of {", ".join(words)}{hint}')
    return names


def text_source(text: str, options: argparse.Namespace) -> Source:
    from sinktrain.data.sources import Source

    return Source(text, options.text_column, options.subset, options.split, options.revision)


def chosen_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {first_line(error)}; use cpu") from error
    return name


def chosen_dtype(name: str | None, device: str) -> torch.dtype:
    """The dtype of this name; without one, float32 on the CPU and bfloat16 on CUDA."""
    import torch

    dtype: torch.dtype = getattr(torch, name or ("bfloat16" if device.startswith("cuda") else "float32"))
    return dtype
