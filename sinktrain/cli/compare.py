"""``sinktrain evaluate`` and ``compare``: measure models under streaming, and write the report."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from sinktrain.cli.parsing import (
    MODEL_FORMS,
    Parser,
    add_device_options,
    add_source_options,
    chosen_device,
    chosen_dtype,
    make_parser,
    names_of,
    number_from,
    number_of_tokens,
    text_source,
)
from sinktrain.cli.printing import print_json
from sinktrain.errors import ConfigError

DEFAULT_TASKS = "telemetry,removal,latency,streameval,access"
ALL_ZERO_SHOT = "zero-shot"
HARNESS_PREFIX = "lm-eval:"
"""Stands before the names of tasks that are lm-evaluation-harness's own affair."""

MEASURED = """\
Losses are counted for each token by each --policies, over the same tokens in every row: `streaming` keeps
S sinks and the W newest tokens (0+W is the paper's window attention), `dense` keeps everything, and
`recompute` reads the last tokens anew for each one, the paper's slow baseline. A difference is paired
token by token and has a 95% interval. --tasks add what losses don't show:

  telemetry   attention on the sink and the first tokens, norms and outliers, and the same untrained
  removal     what is lost without the first token, and with the kept tokens exchanged for line breaks
  latency     ms a token and memory, by policy, layout and length of the stream
  streameval  numbers told in the stream and asked for lines later, in the paper's form
  access      facts asked for from inside the window and beyond it, beside the score of guessing
  zero-shot   the paper's seven tasks, by lm-evaluation-harness (pip install 'sinktrain[lm-eval]'), the sink
              in front of every window; or some of them by their names (arc_easy, piqa, …), or any other
              task of its as lm-eval:NAME. Not streamed; models are paired example by example

--quantize adds what rounding costs, simulated (nothing gets faster), with the sink's slot and without:

  w8a8-static  weights and inputs of linear layers in 8 bits, with one scale for all inputs of a layer
  w8a8-token   the same with a scale for each token
  kv8, kv4     cached keys and values in 8 or 4 bits, with a range for each token and head

All lands in --out: results.json (every number), results.md (for a pull request), report.html (one page
with plots, works offline). What a model gave is kept there, so the same command, cut off, continues."""


def evaluate(arguments: list[str]) -> int:
    parser = _comparison_parser(
        "evaluate",
        "sinktrain evaluate MODEL --text TEXT --out DIR [options]",
        "Measure one model under streaming: its losses by layout, with intervals, and its sink.",
        "sinktrain evaluate runs/quickstart/sink --text shards --out runs/evaluate\n"
        "  sinktrain evaluate EleutherAI/pythia-160m --text book.txt --text code.jsonl --out runs/pythia \\\n"
        "      --layouts 512,1024 --policies streaming,dense,recompute\n"
        "  sinktrain evaluate runs/sink --text shards --tasks none --verify 512 --out runs/check",
    )
    parser.add_argument("models", nargs=1, metavar="MODEL", help=MODEL_FORMS)
    options = parser.parse_args(arguments)
    _check_given(parser, options)
    return _finish("evaluate", _measured("evaluate", options, arguments), options)


def compare(arguments: list[str]) -> int:
    parser = _comparison_parser(
        "compare",
        "sinktrain compare MODEL MODEL … --text TEXT --out DIR [options]\n"
        "       sinktrain compare --from-results FILE --out DIR",
        "Measure models side by side on the same text.",
        "sinktrain compare runs/vanilla runs/sink --text shards --out runs/compare\n"
        "  sinktrain compare runs/vanilla runs/sink --text shards --text book.txt --out runs/compare \\\n"
        "      --layouts 256,512,1+1023 --policies streaming,dense,recompute --max-tokens 4_000_000\n"
        "  sinktrain compare --from-results runs/compare/results.json --out again --wandb sinks",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=MODEL_FORMS)
    parser.add_argument(
        "--from-results",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the report of this results.json again",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.from_results is None:
        _check_given(parser, options)
        return _finish("compare", _measured("compare", options, arguments), options)
    _check_only_rendering(parser, options)
    from sinktrain.report.reading import read_results
    from sinktrain.report.write import check_report_folder

    check_report_folder(options.out)
    _show(read_results(options.from_results), options)
    return 0


# -- options --------------------------------------------------------------------------------------


def _comparison_parser(command: str, usage: str, description: str, example: str) -> Parser:
    parser = make_parser(command, f"{description}\n\n{MEASURED}", example)
    parser.usage = usage
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="text to score, of shards the held-out split; may be given several times. Fewer than 30 "
        "documents make intervals too narrow; in a .txt, lines that say <|doc|> stand between documents",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, results.md, report.html"
    )
    parser.add_argument(
        "--layouts",
        metavar="S+W,…",
        help="sinks + window; a bare N stands for the paper's row, 0+N,1+(N-1),2+(N-2),4+(N-4) "
        "(default: that of half the shortest trained length)",
    )
    parser.add_argument(
        "--policies",
        default="streaming,dense",
        metavar="P,…",
        help="streaming, dense, recompute (default: streaming,dense)",
    )
    parser.add_argument(
        "--tasks",
        default=DEFAULT_TASKS,
        metavar="T,…",
        help="telemetry, removal, latency, streameval, access (default: these), zero-shot, arc_easy, …, "
        "lm-eval:NAME, or none",
    )
    parser.add_argument(
        "--task-folder", type=Path, metavar="DIR", help="task definitions of your own, for lm-eval:NAME"
    )
    parser.add_argument(
        "--task-limit",
        type=number_from(1, of="examples"),
        metavar="N",
        help="examples of each task of lm-evaluation-harness (default: all)",
    )
    parser.add_argument(
        "--quantize",
        metavar="S,…",
        help="w8a8-static, w8a8-token, kv8, kv4, or all (default: none of them)",
    )
    parser.add_argument(
        "--max-tokens",
        type=number_of_tokens,
        default=65_536,
        metavar="N",
        help="of each text, or inf (default: 65536)",
    )
    parser.add_argument(
        "--streams",
        type=number_from(1, of="streams"),
        default=8,
        metavar="N",
        help="parallel streams (default: 8)",
    )
    parser.add_argument(
        "--recompute-tokens",
        type=number_from(1, of="tokens"),
        default=4096,
        metavar="N",
        help="how many tokens the policy recompute scores (default: 4096)",
    )
    parser.add_argument(
        "--verify",
        type=number_from(0, of="tokens"),
        default=0,
        metavar="N",
        help="step the decoder over N tokens too and report the largest difference of logits (default: 0)",
    )
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="log the tables and plots to a new run of this wandb project"
    )
    add_source_options(parser)
    add_device_options(parser, default_dtype=None)
    return parser


def _check_given(parser: Parser, options: argparse.Namespace) -> None:
    given = {"MODEL": options.models, "--text": options.text}
    missing = [name for name, value in given.items() if not value]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _check_only_rendering(parser: Parser, options: argparse.Namespace) -> None:
    used = {"from_results", "out", "wandb", "json"}
    extra = [
        "MODEL" if name == "models" else f"--{name.replace('_', '-')}"
        for name, value in vars(options).items()
        if name not in used and value != parser.get_default(name) and value != []
    ]
    if extra:
        raise ConfigError(f"--from-results measures nothing, so leave out {', '.join(extra)}")


def _tasks(typed: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``--tasks`` as our own tasks and those of lm-evaluation-harness, by its names."""
    from sinktrain.evaluation.compare import TASKS, ZERO_SHOT

    given = [name for name in typed.split(",") if not name.startswith(HARNESS_PREFIX)]
    others = [name.removeprefix(HARNESS_PREFIX) for name in typed.split(",") if name not in given]
    if others and (not all(others) or "none" in given):
        raise ConfigError(f"--tasks {typed}: write {HARNESS_PREFIX}NAME, and none alone")
    known = (*TASKS, ALL_ZERO_SHOT, *ZERO_SHOT)
    names = names_of("--tasks", ",".join(given), known, alone="none") if given else ()
    harness = [ZERO_SHOT if name == ALL_ZERO_SHOT else (name,) for name in names if name not in TASKS]
    found = dict.fromkeys([*(name for some in harness for name in some), *others])
    return tuple(name for name in names if name in TASKS), tuple(found)


# -- steps ----------------------------------------------------------------------------------------


def _measured(command: str, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    from sinktrain.evaluation import compare as comparing
    from sinktrain.evaluation.perplexity import POLICIES
    from sinktrain.evaluation.quantizers import SCHEMES
    from sinktrain.report.wandb_log import check_wandb
    from sinktrain.report.write import check_report_folder
    from sinktrain.streaming.layout import parse_layouts

    policies = names_of("--policies", options.policies, POLICIES)
    tasks, harness = _tasks(options.tasks)
    schemes: tuple[str, ...] = ()
    if options.quantize is not None:
        schemes = names_of("--quantize", options.quantize, tuple(SCHEMES), alone="all") or tuple(SCHEMES)
    layouts = parse_layouts(options.layouts) if options.layouts else []
    check_report_folder(options.out)
    if options.wandb is not None:
        check_wandb(options.wandb)
    device = chosen_device(options.device)
    return comparing.compare(
        comparing.Comparison(
            models=options.models,
            texts=[text_source(text, options) for text in options.text],
            layouts=layouts,
            policies=policies,
            tasks=tasks,
            max_tokens=options.max_tokens,
            num_streams=options.streams,
            recompute_tokens=options.recompute_tokens,
            verify_tokens=options.verify,
            schemes=schemes,
            harness=harness,
            task_folder=options.task_folder,
            task_limit=options.task_limit,
            device=device,
            dtype=chosen_dtype(options.dtype, device),
            out=options.out,
            command=shlex.join(["sinktrain", command, *arguments]),
        )
    )


def _finish(command: str, results: dict[str, Any], options: argparse.Namespace) -> int:
    """Show what was measured, then name the models that failed."""
    _show(results, options)
    failures = {row["error"]: row for row in results["failed"]}  # a task without data fails for all models
    for row in failures.values():
        error = " ".join(row["error"].split())
        subject = "" if row["model"] in error or "task" in row else f"{row['model']}: "
        print(
            f"sinktrain {command}: {subject}{error}; the others' results are kept, "
            "the same command tries it again",
            file=sys.stderr,
        )
    return 2 if results["failed"] else 0


def _show(results: dict[str, Any], options: argparse.Namespace) -> None:
    from sinktrain.report.terminal import terminal_table
    from sinktrain.report.write import write_report

    write_report(results, options.out)
    if options.json:
        print_json(results)
    else:
        print(terminal_table(results, shutil.get_terminal_size().columns))
    print(f"report: {options.out / 'report.html'}", file=sys.stderr)
    if options.wandb is not None:
        from sinktrain.report.wandb_log import log_report

        log_report(results, options.out, options.wandb)
