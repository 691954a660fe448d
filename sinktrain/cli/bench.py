"""``sinktrain bench``: how fast training, decoding and evaluation are, floors and peers beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sinktrain.cli.parsing import (
    Parser,
    add_device_options,
    chosen_device,
    chosen_dtype,
    make_parser,
    names_of,
    number_from,
    number_list,
    number_of_tokens,
)
from sinktrain.cli.printing import print_json
from sinktrain.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from sinktrain.streaming.layout import Layout

DESCRIPTION = """\
Time one thing, with the floor under it or its peers beside it in the same run.

  train      ours under a real Trainer, the same step in a bare loop and, with --peers, plain torch,
             transformers and litgpt from the same weights: rounds in turn, the median of each. With
             --devices N ours on one device and on N.
  decode     token by token: our decoder and, with --peers, other ways. The floor is, on CUDA, the bytes
             of weights and cache over the bandwidth of a large copy, and on the CPU the step's matrix
             products alone. Memory on the CPU is the whole process's.
  evaluate   losses of a long text in blocks, exactly as if streamed: tokens/s, the floor that the
             floating-point operations set, and how much slower token by token would be."""

EXAMPLE = """\
sinktrain bench train --preset 160m,410m --peers --kinds token
  sinktrain bench train --preset 160m --devices 2 --strategy ddp
  sinktrain bench decode --preset 14m,160m --layouts 1+1023,1+4095 --batch 1
  sinktrain bench decode --preset 160m --peers --json > bench.json
  sinktrain bench decode --preset 14m --trace --tokens 1_000_000
  sinktrain bench evaluate --preset 160m --layouts 1+1023
  sinktrain bench evaluate --model runs/sink --layouts 1+511 --tokens 4_000_000 --streams 16"""


def bench(arguments: list[str]) -> int:
    parser = _bench_parser()
    options = parser.parse_args(arguments)
    if options.subject not in SUBJECTS:
        hint = did_you_mean(options.subject, SUBJECTS)
        raise ConfigError(f'no benchmark "{options.subject}"{hint}; there are {", ".join(SUBJECTS)}')
    for name, subjects in ONLY_FOR.items():
        if options.subject not in subjects and getattr(options, name) != parser.get_default(name):
            named = " and ".join(subjects)
            raise ConfigError(f"--{name.replace('_', '-')} is for bench {named}; leave it out here")
    if options.model is not None and options.preset is not None:
        raise ConfigError("--model and --preset both say what to time; give one of them")
    if options.tokens is None:
        raise ConfigError("--tokens inf would never end; use a number")
    if options.threads is not None:
        _use_threads(options.threads)
    SUBJECTS[options.subject](options)
    return 0


def _bench_parser() -> Parser:
    parser = make_parser("bench", DESCRIPTION, EXAMPLE)
    parser.add_argument("subject", metavar="train|decode|evaluate", help="what to time")
    parser.add_argument(
        "--preset", metavar="P,…", help="sizes of Pythia, weights random: 14m, 31m, … 1.4b (default: 160m)"
    )
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint instead")
    parser.add_argument(
        "--layouts",
        metavar="S+W,…",
        help="default: 1+1023; longer ones than the model was trained on are timed too, since speed does not "
        "depend on it. evaluate times the paper's four layouts of the same size besides, as one table",
    )
    add_device_options(parser, default_dtype=None)
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch has it)")
    parser.add_argument(
        "--tokens",
        type=number_of_tokens,
        default=0,
        metavar="N",
        help="timed tokens (default of decode: 256, on CUDA 2000, of evaluate: by the device); "
        "with --trace the last position (1000000)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="train: plain torch, transformers, litgpt; decode: transformers, recomputing, the paper's cache",
    )
    _add_train_options(parser)
    group = parser.add_argument_group("of decode")
    group.add_argument("--batch", metavar="N,…", help="parallel streams (default: 1, on CUDA 1,32)")
    group.add_argument(
        "--recompute-windows",
        default="256,512,1024,2048,4096",
        metavar="N,…",
        help="with --peers: cache sizes of the paper's comparison with recomputation, or none "
        "(default: 256,512,1024,2048,4096)",
    )
    group.add_argument(
        "--trace", action="store_true", help="one long stream: cost and memory at 2,000, 10,000, … tokens"
    )
    group = parser.add_argument_group("of evaluate")
    group.add_argument(
        "--streams",
        type=number_from(1, of="streams"),
        default=0,
        metavar="N",
        help="default: by the device",
    )
    return parser


def _add_train_options(parser: Parser) -> None:
    group = parser.add_argument_group(
        "of train", "--dtype is that of the products; weights are float32. Numbers left out go by the device."
    )
    for option, of, told in (
        ("--micro-batch", "samples", "computed at once (32, 16 for 410m, 8 for 1b and 1.4b; on the CPU 1)"),
        ("--global-batch", "samples", "of a step, over all devices (two micro-batches of each)"),
        ("--seq-len", "tokens", "of a sample (2048; on the CPU 128)"),
        ("--steps", "steps", "of each contender in each round (20; on the CPU 2)"),
        ("--rounds", "rounds", "(3)"),
    ):
        group.add_argument(option, type=number_from(1, of=of), default=0, metavar="N", help=told)
    group.add_argument("--kinds", metavar="K,…", help="time these sink kinds too: token, zero, …, or all")
    group.add_argument("--devices", type=number_from(1, of="devices"), default=1, metavar="N", help="(1)")
    group.add_argument("--strategy", metavar="OVERLAY", help="ddp (with --devices), fsdp, deepspeed-zero1, …")


def _bench_train(options: argparse.Namespace) -> None:
    import torch

    from sinktrain.experiments.bench_table import train_table
    from sinktrain.experiments.bench_train import NUM_ROUNDS, TrainBench, bench_train
    from sinktrain.training.stopping import Stopped

    device = torch.device(chosen_device(options.device))
    request = TrainBench(
        configs=[f"pythia-{preset}" for preset in _presets(options)],
        device=device,
        dtype=chosen_dtype(options.dtype, device.type),
        seq_len=options.seq_len,
        micro_batch=options.micro_batch,
        global_batch=options.global_batch,
        num_steps=options.steps,
        num_rounds=options.rounds or NUM_ROUNDS,
        use_peers=options.peers,
        kinds=_kinds(options.kinds),
        num_devices=options.devices,
        strategy=options.strategy,
    )
    try:
        result = bench_train(request)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signum) from None
    if result is not None:  # rank 0 speaks for all
        _show(result, train_table, options)
        if result["stopped"]:
            raise SystemExit(128 + result["stopped"])


def _bench_decode(options: argparse.Namespace) -> None:
    import torch

    from sinktrain.experiments.bench import DecodeBench, bench_decode
    from sinktrain.experiments.bench_table import bench_table

    typed_windows = options.recompute_windows
    windows = [] if typed_windows == "none" else number_list("--recompute-windows", typed_windows)
    batch_sizes = number_list("--batch", options.batch) if options.batch else []
    device = torch.device(chosen_device(options.device))
    on_cuda = device.type == "cuda"
    num_tokens = options.tokens or (1_000_000 if options.trace else 2000 if on_cuda else 256)
    result = bench_decode(
        DecodeBench(
            presets=_presets(options),
            model=options.model,
            layouts=_layouts(options),
            batch_sizes=batch_sizes or ([1, 32] if on_cuda and not options.trace else [1]),
            device=device,
            dtype=chosen_dtype(options.dtype, device.type),
            num_tokens=num_tokens,
            use_peers=options.peers,
            recompute_windows=windows if options.peers else [],
            is_trace=options.trace,
        )
    )
    _show(result, bench_table, options)


def _bench_evaluate(options: argparse.Namespace) -> None:
    import torch

    from sinktrain.experiments.bench_evaluate import EvaluateBench, bench_evaluate, evaluate_table

    device = torch.device(chosen_device(options.device))
    result = bench_evaluate(
        EvaluateBench(
            presets=_presets(options),
            model=options.model,
            layouts=_layouts(options),
            num_tokens=options.tokens,
            num_streams=options.streams,
            device=device,
            dtype=chosen_dtype(options.dtype, device.type),
        )
    )
    _show(result, evaluate_table, options)


def _show(
    result: dict[str, Any], table: Callable[[dict[str, Any]], str], options: argparse.Namespace
) -> None:
    if options.json:
        print_json(result)
    else:
        print(table(result))


SUBJECTS = {"train": _bench_train, "decode": _bench_decode, "evaluate": _bench_evaluate}
ONLY_FOR = {
    "model": ["decode", "evaluate"],
    "layouts": ["decode", "evaluate"],
    "tokens": ["decode", "evaluate"],
    "batch": ["decode"],
    "peers": ["train", "decode"],
    "recompute_windows": ["decode"],
    "trace": ["decode"],
    "streams": ["evaluate"],
    "micro_batch": ["train"],
    "global_batch": ["train"],
    "seq_len": ["train"],
    "steps": ["train"],
    "rounds": ["train"],
    "kinds": ["train"],
    "devices": ["train"],
    "strategy": ["train"],
}
"""Options that not every subject takes."""


def _presets(options: argparse.Namespace) -> list[str]:
    from sinktrain.experiments.bench import preset_name

    return [] if options.model else [preset_name(preset) for preset in (options.preset or "160m").split(",")]


def _kinds(typed: str | None) -> list[str]:
    """Kinds to time beside vanilla, which is timed anyway."""
    from sinktrain.model.sinks.base import KINDS

    others = sorted(set(KINDS) - {"none"})
    return list(names_of("--kinds", typed, others, alone="all") or others) if typed else []


def _layouts(options: argparse.Namespace) -> list[Layout]:
    from sinktrain.streaming.layout import Layout

    return [Layout.parse(one) for one in options.layouts.split(",")] if options.layouts else []


def _use_threads(num_threads: int) -> None:
    import torch

    if num_threads < 1:
        raise ConfigError(f"--threads {num_threads} is not a number of threads; use 1 or more")
    torch.set_num_threads(num_threads)
