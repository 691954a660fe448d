"""The command line: thin, so that ``sinktrain --help`` is instant; each command imports what it needs."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from sinktrain.errors import ConfigError, SinktrainError, did_you_mean, first_line

USER_MISTAKE, INTERRUPTED = 2, 130

DESCRIPTION = """\
Pretrain GPT-NeoX models with or without an attention sink, stream them, and compare.

commands:
  prepare    text -> tokenizer and verified token shards
  fit        shards -> a trained model (LightningCLI; continues where it was cut off)
  validate   held-out loss of a checkpoint
  stream     a model -> endless text, in constant memory
  evaluate   measure one model under streaming
  compare    measure several side by side: table, results.json, report.html
  export     a model -> a Hugging Face folder, its logits checked
  bench      how fast decoding is, with its floor and its peers beside it

MODEL is a run folder, a .ckpt file, a Hugging Face folder or a Hub id (EleutherAI/pythia-160m).
TEXT is a .txt, .jsonl or .parquet file (also .gz, .xz, .zst), a folder of them, prepared shards,
or a Hub dataset id.
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
        return COMMANDS[command](arguments[1:])
    if arguments and arguments[0] == "--version":
        from sinktrain import __version__

        print(f"sinktrain {__version__}")
        return 0
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(f'no option "{arguments[0]}" before the command; see sinktrain --help')
    print(f"usage: sinktrain COMMAND …\n\n{DESCRIPTION}\n{EXAMPLE}\nsinktrain COMMAND --help says more.")
    return 0


# -- commands -------------------------------------------------------------------------------------


def _prepare(arguments: list[str]) -> int:
    parser = _parser(
        "prepare",
        "Turn a text into a tokenizer and verified token shards. Cut off, the same command continues.",
        "sinktrain prepare book.txt --out shards --vocab-size 4096\n"
        "  sinktrain prepare monology/pile-uncopyrighted --tokenizer EleutherAI/pythia-160m --out shards\n"
        "  sinktrain prepare --verify shards",
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="file, folder or Hub dataset id")
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
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="stop after so many tokens")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check the hashes of shards and stop")
    _add_source_options(parser)
    options = parser.parse_args(arguments)
    from sinktrain.data import prepare, shards

    if options.verify is not None:
        _print_manifest(shards.verify(options.verify), options.verify, options.json)
        return 0
    if options.text is None or options.out is None:
        raise ConfigError("say what to prepare and where to: sinktrain prepare TEXT --out DIR")
    manifest = prepare.prepare(
        prepare.PrepareOptions(
            source=_source(options),
            out=options.out,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            val_fraction=options.val_fraction,
            max_tokens=options.max_tokens,
            workers=options.workers,
        )
    )
    _print_manifest(manifest, options.out, options.json)
    return 0


def _fit(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(FIT_HELP)
        return 0
    from sinktrain.training.callbacks import Stopped
    from sinktrain.training.fit import fit

    try:
        fit(_full_help(arguments))
    except Stopped as stopped:
        print(f"sinktrain fit: {stopped} and saved; the same command continues", file=sys.stderr)
        return 128 + stopped.signum
    return 0


def _validate(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(VALIDATE_HELP)
        return 0
    from sinktrain.training.fit import validate

    as_json = "--json" in arguments
    result = validate(_full_help([argument for argument in arguments if argument != "--json"]))
    print(json.dumps(result) if as_json else f"held-out loss {result['val/loss']:.4f} nats")
    return 0


def _stream(arguments: list[str]) -> int:
    parser = _parser(
        "stream",
        STREAM_DESCRIPTION,
        'sinktrain stream runs/quickstart/sink --prompt "Enter the KING" --max-tokens 500 --stats\n'
        "  sinktrain stream runs/quickstart/sink --turns --temperature 0.8 --min-p 0.05\n"
        "  sinktrain stream runs/quickstart/sink --turns < lines.txt > replies.txt",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="what to continue; - reads it from stdin"
    )
    parser.add_argument("--layout", metavar="S+W", help="sinks + window (default: half the trained length)")
    parser.add_argument("--turns", action="store_true", help="answer stdin line by line, in one stream")
    parser.add_argument(
        "--max-tokens",
        type=_count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"a number, or inf (default: inf; with --turns {MAX_REPLY_TOKENS}, for each reply)",
    )
    parser.add_argument("--stats", action="store_true", help="speed, cache, position and memory on stderr")
    _add_model_options(parser)
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
    _check_sampling(options)
    if options.turns and options.prompt == "-":
        raise ConfigError("--prompt - and --turns both read stdin; write the prompt out: --prompt TEXT")
    _stream_to_stdout(options)
    return 0


def _evaluate(arguments: list[str]) -> int:
    parser = _comparison_parser(
        "evaluate",
        "Measure one model under streaming: loss by layout, with intervals.",
        "sinktrain evaluate runs/quickstart/sink --text shards --out runs/evaluate",
    )
    parser.add_argument("models", nargs=1, metavar="MODEL")
    return _compare_models(parser.parse_args(arguments))


def _compare(arguments: list[str]) -> int:
    parser = _comparison_parser(
        "compare",
        "Measure models side by side on the same text, differences paired token by token.",
        "sinktrain compare runs/vanilla runs/sink --text shards --out runs/compare",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    return _compare_models(parser.parse_args(arguments))


def _export(arguments: list[str]) -> int:
    parser = _parser(
        "export",
        "Write a Hugging Face folder that plain transformers loads; its logits are checked first.",
        "sinktrain export runs/quickstart/sink --out sink-model",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args(arguments)
    from sinktrain.publishing.export import export

    exported = export(options.model, options.out)
    if options.json:
        print(json.dumps(asdict(exported), default=str))
        return 0
    print(
        f"{exported.folder}: loads with plain transformers; "
        f"its logits differ by {exported.max_logit_diff:.1e} at most"
    )
    if not exported.has_tokenizer:
        print(f"{options.model} has no tokenizer, so there is none in the folder", file=sys.stderr)
    return 0


def _bench(arguments: list[str]) -> int:
    parser = _parser(
        "bench",
        "Time decoding: our decoder, the floor under it, and with --peers other ways, all in one run.\n"
        "The floor is, on CUDA, the bytes of weights and cache over the bandwidth of a large copy, and on\n"
        "the CPU the step's matrix products alone. Memory on the CPU is the whole process's.",
        "sinktrain bench decode --preset 14m,160m --layouts 1+1023,1+4095 --batch 1\n"
        "  sinktrain bench decode --preset 160m --peers --json > bench.json\n"
        "  sinktrain bench decode --preset 14m --trace --tokens 1_000_000",
    )
    parser.add_argument("subject", metavar="decode", help="what to time")
    parser.add_argument(
        "--preset", metavar="P,…", help="sizes of Pythia, weights random: 14m, 31m, … 1.4b (default: 160m)"
    )
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint instead")
    parser.add_argument(
        "--layouts",
        metavar="S+W,…",
        help="default: 1+1023; longer ones than the model was trained on are timed too, "
        "since speed does not depend on it",
    )
    parser.add_argument("--batch", metavar="N,…", help="parallel streams (default: 1, on CUDA 1,32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16"],
        help="default: float32, on CUDA bfloat16",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch has it)")
    parser.add_argument(
        "--tokens",
        type=_count,
        default=0,
        metavar="N",
        help="timed tokens (default: 256, on CUDA 2000); with --trace the last position (1000000)",
    )
    parser.add_argument("--peers", action="store_true", help="transformers, recomputation, the paper's cache")
    parser.add_argument(
        "--recompute-windows",
        default="256,512,1024,2048,4096",
        metavar="N,…",
        help="with --peers: cache sizes of the paper's comparison with recomputation, or none "
        "(default: 256,512,1024,2048,4096)",
    )
    parser.add_argument(
        "--trace", action="store_true", help="one long stream: cost and memory at 2,000, 10,000, … tokens"
    )
    options = parser.parse_args(arguments)
    if options.subject != "decode":
        raise ConfigError(f'no benchmark "{options.subject}"; there is decode: sinktrain bench decode')
    _bench_decode(options)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": _prepare,
    "fit": _fit,
    "validate": _validate,
    "stream": _stream,
    "evaluate": _evaluate,
    "compare": _compare,
    "export": _export,
    "bench": _bench,
}

STREAM_DESCRIPTION = """\
Continue a prompt for ever, in constant memory. Ctrl-C ends it.

With --turns it is a dialogue: each line of stdin goes on in the same stream, and the model's next line
is the reply; Ctrl-D ends it. A base model knows no roles, so a --prompt that shows how the lines go
helps. A reply ends with its line, at an end of text, or after --max-tokens, and is one line of stdout."""

MAX_REPLY_TOKENS = 200

FIT_HELP = """\
usage: sinktrain fit --config FILE_OR_NAME [--config OVERLAY …] [--run DIR] [options]

Train a model on prepared shards. Cut off, the same command continues where it was.

  --config NAME       quickstart, pythia-14m, -31m, -70m, -160m, -410m, -1b, -1.4b, or a YAML file;
                      then overlays: sink, ddp, wandb, tensorboard. Later ones win.
  --run DIR           run folder (default: runs/ and the names of the configs)
  --resume WHAT       auto (default), none, or a checkpoint's path
  --data.path SHARDS  made by sinktrain prepare
  --data.global_batch N, --data.micro_batch N      samples of a step, and computed at once
  --trainer.max_steps N, --trainer.devices N       as Lightning has them
  --model.sink.kind token, --model.init_from MODEL, --model.learning_rate X, …
  --checkpoint.every_n_steps N, --seed_everything N
  --print_config      every setting, with its value, as YAML
  --help-all          every setting, with its meaning (takes some seconds)

example:
  sinktrain fit --config pythia-160m --config sink --config ddp --data.path shards
"""

VALIDATE_HELP = """\
usage: sinktrain validate --config FILE [--ckpt_path PATH] [options of fit] [--json]

Held-out loss of a checkpoint, on the targets that all arms share.

example:
  sinktrain validate --config runs/quickstart/sink/config.yaml \\
      --ckpt_path runs/quickstart/sink/checkpoints/last.ckpt
"""


# -- parsing --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        hint = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        raise ConfigError(f"{message}{hint}; see {self.prog} --help")


def _parser(command: str, description: str, example: str) -> _Parser:
    parser = _Parser(
        prog=f"sinktrain {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command != "stream":
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _comparison_parser(command: str, description: str, example: str) -> _Parser:
    parser = _parser(command, description, example)
    parser.add_argument(
        "--text", required=True, metavar="TEXT", help="text to score; of shards, the held-out split"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, results.md, report.html"
    )
    parser.add_argument(
        "--layouts", metavar="S+W,…", help="default: 0+N,1+(N-1),2+(N-2),4+(N-4), N half the trained length"
    )
    parser.add_argument("--policies", default="streaming,dense", metavar="P,…", help="streaming, dense")
    parser.add_argument(
        "--max-tokens", type=_count, default=65_536, metavar="N", help="of the text, or inf (default: 65536)"
    )
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="parallel streams (default: 8)")
    _add_source_options(parser)
    _add_model_options(parser)
    return parser


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of the text")
    group.add_argument(
        "--text-column", metavar="C", help="column of .jsonl, .parquet and Hub datasets (text)"
    )
    group.add_argument("--subset", metavar="NAME", help="of a Hub dataset")
    group.add_argument("--split", metavar="S", default="train", help="of a Hub dataset (train)")
    group.add_argument("--revision", metavar="R", help="of a Hub dataset")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])


def _count(text: str) -> int | None:
    """A number of tokens; None for ``inf``."""
    if text == "inf":
        return None
    try:
        number = int(text.replace("_", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens; use 1 or more, or inf")
    return number


def _full_help(arguments: list[str]) -> list[str]:
    return ["--help" if argument == "--help-all" else argument for argument in arguments]


def _source(options: argparse.Namespace) -> Any:
    from sinktrain.data.sources import Source

    return Source(options.text, options.text_column, options.subset, options.split, options.revision)


def _check_sampling(options: argparse.Namespace) -> None:
    if not 0 <= options.temperature < math.inf:
        raise ConfigError(f"--temperature {options.temperature} cannot be sampled at; use 0 or more")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p} is not a probability; use more than 0, at most 1")
    if options.top_k is not None and options.top_k < 1:
        raise ConfigError(f"--top-k {options.top_k} keeps no token; use 1 or more")
    if options.min_p is not None and not 0 <= options.min_p <= 1:
        raise ConfigError(f"--min-p {options.min_p} is not a share; use 0 to 1")
    if not 0 < options.repetition_penalty < math.inf:
        raise ConfigError(
            f"--repetition-penalty {options.repetition_penalty} cannot be used; use more than 0 (1 is none)"
        )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed} is out of range; use 0 to {2**63 - 1}")


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {first_line(error)}; use cpu") from error
    return name


# -- steps ----------------------------------------------------------------------------------------


def _print_manifest(manifest: Any, folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(manifest)))
        return
    train, val = manifest.splits["train"], manifest.splits["val"]
    print(
        f"{folder}: {train.tokens:,} training and {val.tokens:,} held-out tokens, vocabulary of "
        f"{manifest.vocab_size:,} padded to {manifest.padded_vocab_size:,}"
    )


def _stream_to_stdout(options: argparse.Namespace) -> None:
    import torch

    from sinktrain.model.checkpoints import load_model
    from sinktrain.streaming.decoder import StreamingDecoder
    from sinktrain.streaming.layout import Layout, stream_layout
    from sinktrain.streaming.text import Dialogue, stream_text, tokenizer_of

    prompt = _prompt(options.prompt)
    model = load_model(options.model, _device(options.device), getattr(torch, options.dtype))
    tokenizer = tokenizer_of(model.config, options.model)
    layout = Layout.parse(options.layout) if options.layout else stream_layout(model.config)
    decoder = StreamingDecoder(model, layout.sinks, layout.window)
    max_tokens = getattr(options, "max_tokens", MAX_REPLY_TOKENS if options.turns else None)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = {name: getattr(options, name) for name in names}
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


def _compare_models(options: argparse.Namespace) -> int:
    import torch

    from sinktrain.evaluation.compare import Comparison, compare
    from sinktrain.evaluation.perplexity import POLICIES
    from sinktrain.report.tables import terminal_table
    from sinktrain.report.write import check_report_folder, write_report
    from sinktrain.streaming.layout import Layout

    if options.streams < 1:
        raise ConfigError(f"--streams {options.streams} is not a number of streams; use 1 or more")
    policies = tuple(options.policies.split(","))
    layouts = options.layouts.split(",") if options.layouts else []
    for policy in policies:
        if policy not in POLICIES:
            hint = did_you_mean(policy, POLICIES)
            raise ConfigError(f'--policies "{policy}" is not one of {", ".join(POLICIES)}{hint}')
    check_report_folder(options.out)
    results = compare(
        Comparison(
            models=options.models,
            text=_source(options),
            layouts=[Layout.parse(layout) for layout in layouts],
            policies=policies,
            max_tokens=options.max_tokens,
            num_streams=options.streams,
            device=_device(options.device),
            dtype=getattr(torch, options.dtype),
        )
    )
    write_report(results, options.out)
    width = shutil.get_terminal_size().columns
    print(json.dumps(results) if options.json else terminal_table(results, width))
    print(f"report: {options.out / 'report.html'}", file=sys.stderr)
    return 0


def _bench_decode(options: argparse.Namespace) -> None:
    import torch

    from sinktrain.experiments.bench import DecodeBench, bench_decode, preset_name
    from sinktrain.experiments.bench_table import bench_table
    from sinktrain.streaming.layout import Layout

    if options.model is not None and options.preset is not None:
        raise ConfigError("--model and --preset both say what to time; give one of them")
    presets = [] if options.model else (options.preset or "160m").split(",")
    batch_sizes = _numbers("--batch", options.batch) if options.batch else []
    typed_windows = options.recompute_windows
    windows = [] if typed_windows == "none" else _numbers("--recompute-windows", typed_windows)
    if options.tokens is None:
        raise ConfigError("--tokens inf would never end; use a number")
    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"--threads {options.threads} is not a number of threads; use 1 or more")
        torch.set_num_threads(options.threads)
    device = torch.device(_device(options.device))
    on_cuda = device.type == "cuda"
    num_tokens = options.tokens or (1_000_000 if options.trace else 2000 if on_cuda else 256)
    result = bench_decode(
        DecodeBench(
            presets=[preset_name(preset) for preset in presets],
            model=options.model,
            layouts=[
                Layout.parse(layout) for layout in (options.layouts or "").split(",") if options.layouts
            ],
            batch_sizes=batch_sizes or ([1, 32] if on_cuda and not options.trace else [1]),
            device=device,
            dtype=getattr(torch, options.dtype or ("bfloat16" if on_cuda else "float32")),
            num_tokens=num_tokens,
            use_peers=options.peers,
            recompute_windows=windows if options.peers else [],
            is_trace=options.trace,
        )
    )
    print(json.dumps(result) if options.json else bench_table(result))


def _numbers(option: str, typed: str) -> list[int]:
    """``1,32`` as numbers from 1 on."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", typed):
        raise ConfigError(f"{option} {typed} is not a list of numbers from 1 on; write it like 1,32")
    return [int(number) for number in typed.split(",")]


def _mistake(command: str, message: str) -> int:
    print(f"{f'sinktrain {command}'.rstrip()}: {' '.join(message.split())}", file=sys.stderr)
    return USER_MISTAKE
