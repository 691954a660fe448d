"""The command line: thin, so that ``sinktrain --help`` is instant; commands are imported as they run."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from sinktrain.errors import ConfigError, SinktrainError, did_you_mean
from sinktrain.report.wording import printable

USER_MISTAKE, INTERRUPTED = 2, 130

COMMANDS = {
    "prepare": "sinktrain.cli.prepare",
    "fit": "sinktrain.cli.fit",
    "validate": "sinktrain.cli.validate",
    "study": "sinktrain.cli.study",
    "stream": "sinktrain.cli.stream",
    "evaluate": "sinktrain.cli.compare",
    "compare": "sinktrain.cli.compare",
    "export": "sinktrain.cli.export",
    "publish": "sinktrain.cli.publish",
    "bench": "sinktrain.cli.bench",
    "doctor": "sinktrain.cli.doctor",
}
"""The module of each command; its function has the command's name and takes what was typed after it."""

DESCRIPTION = """\
Pretrain GPT-NeoX models with or without an attention sink, stream them, and compare.

commands:
  prepare    text -> tokenizer and verified token shards
  fit        shards -> a trained model (LightningCLI; continues where it was cut off)
  validate   held-out loss of a run, or of one of its checkpoints
  study      arms x seeds: prepared, trained, compared, continued where it was cut off
  stream     a model -> endless text, in constant memory
  evaluate   measure one model under streaming: losses, sink, removal, latency, StreamEval
  compare    measure several side by side: table, results.json, report.html, wandb
  export     a model -> a Hugging Face folder, its logits checked
  publish    models -> the Hugging Face Hub, each with its card, in one commit
  bench      how fast training, decoding or evaluation is, floor or peers beside it
  doctor     what of this machine would stop or slow a run

MODEL is a run folder, a .ckpt file, a Hugging Face folder or a Hub id (EleutherAI/pythia-160m, or
EleutherAI/pythia-160m@step1000 for one of its revisions).
TEXT is a .txt, .jsonl or .parquet file (also .gz, .xz, .zst), a folder of them, prepared shards,
or a Hub dataset id. A document is a line of .jsonl, a row of .parquet, or a .txt file, which lines
that say <|doc|> cut into several.
"""

EXAMPLE = """\
example:
  sinktrain prepare book.txt --out shards --vocab-size 4096
  sinktrain fit --config pythia-14m --data.path shards --run runs/vanilla
  sinktrain fit --config pythia-14m --config sink --data.path shards --run runs/sink
  sinktrain compare runs/vanilla runs/sink --text shards --out runs/compare
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    share_cores()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no 日 shows ?
    try:
        exit_code = _dispatch(command, arguments)
        sys.stdout.flush()  # a reader that has gone is noticed here, not while Python shuts down
        return exit_code
    except SinktrainError as error:
        return _mistake(command, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough: `sinktrain stream … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _mistake(command, f"{error.filename}: {error.strerror}")  # a full disk, no permission


def share_cores() -> None:
    """Let idle threads sleep instead of spin; to be called before torch is imported.

    libgomp's threads spin while they wait for each other. Where another process needs a core, that
    made small matrix products 20 times slower (two cores, one other busy process).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _dispatch(command: str, arguments: list[str]) -> int:
    if command:
        if command not in COMMANDS:
            hint = did_you_mean(command, COMMANDS)
            raise ConfigError(f'no command "{command}"{hint}; see sinktrain --help')
        exit_code: int = getattr(import_module(COMMANDS[command]), command)(arguments[1:])
        return exit_code
    if arguments and arguments[0] == "--version":
        from sinktrain import __version__

        print(f"sinktrain {__version__}")
        return 0
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(f'no option "{arguments[0]}" before the command; see sinktrain --help')
    print(f"usage: sinktrain COMMAND …\n\n{DESCRIPTION}\n{EXAMPLE}\nsinktrain COMMAND --help says more.")
    return 0


def _mistake(command: str, message: str) -> int:
    line = printable(" ".join(message.split()))  # names and words of the Hub may be in it
    print(f"{f'sinktrain {command}'.rstrip()}: {line}", file=sys.stderr)
    return USER_MISTAKE
