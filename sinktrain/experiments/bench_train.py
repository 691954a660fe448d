"""How fast training is: ours as ``sinktrain fit`` runs it, its step in a bare loop, and its peers.

In one process rounds go in turn: each contender trains for some steps, then the next one, and so on again;
the median over the rounds is told. All train on the same random windows with the same micro-batches, clip,
and take an AdamW step; peers start from our weights and are timed only if their first losses are ours.
Under a strategy ours alone is timed, and beside it, on rank 0 and before the others start, one device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from sinktrain.errors import ConfigError, SinktrainError, did_you_mean, first_line
from sinktrain.evaluation.timing import check_timed, release_memory
from sinktrain.experiments.machine import environment, package_version
from sinktrain.experiments.peer_training import PeerTraining
from sinktrain.experiments.training_contenders import (
    NUM_BATCHES,
    PRECISION,
    Contender,
    OurTraining,
    Record,
    Workload,
    is_rank_zero,
    write_random_shards,
)
from sinktrain.experiments.training_peers import PEERS
from sinktrain.model.config import ModelConfig
from sinktrain.model.devices import dtype_name
from sinktrain.training.configs import config_folder
from sinktrain.training.stopping import Stopped
from sinktrain.training.throughput import flops_per_token, peak_flops

SCHEMA_VERSION = 1
OURS = "sinktrain"
NUM_ROUNDS = 3
SEQ_LEN = {"cpu": 128, "cuda": 2048}
NUM_STEPS = {"cpu": 2, "cuda": 20}
MICRO_BATCH = {"cpu": 1, "cuda": 32}
SMALLER_MICRO_BATCH = {"410m": 16, "1b": 8, "1.4b": 8}
"""On CUDA: what peers that hold all logits have room for in 80 GB."""
ACCUMULATED = 2
"""Micro-batches of a device's share of a global batch."""
RANK_VARIABLES = ("LOCAL_RANK", "RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class TrainBench:
    """What to time.

    Args:
        configs: of ``sinktrain fit``, by name or path.
        dtype: of the products, bfloat16 (autocast) or float32; weights are float32.
        seq_len, micro_batch, global_batch, num_steps: chosen by device and config when 0.
        num_steps: of each contender in each round.
        use_peers: time the peers too.
        kinds: of sinks, whose arms are timed too.
        num_devices: processes of ``strategy``.
        strategy: an overlay's name; ``ddp`` when None and there are several devices.
    """

    configs: Sequence[str] = ("pythia-160m",)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seq_len: int = 0
    micro_batch: int = 0
    global_batch: int = 0
    num_steps: int = 0
    num_rounds: int = NUM_ROUNDS
    use_peers: bool = False
    kinds: Sequence[str] = ()
    num_devices: int = 1
    strategy: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One way of training one config; None where it was not measured, and ``note`` says why.

    Args:
        tokens_per_s: over all devices, from the median of ``step_s_rounds``.
        spread: the slowest round's time less the fastest's, over the median.
        ours_over_this: tokens/s of ``sinktrain`` over this row's.
        overhead: of Trainer and callbacks: the time of a step over that of the bare loop, less 1.
        speedup, efficiency: over one device, in all and by device.
        mfu, mfu_causal: see ``flops_per_token``; None where the device's peak is unknown.
        peak_mem_bytes, checkpoint_s: as in ``Record``.
        compile_s: of the first steps, what is more than their usual time.
        data_wait: share of the time.
    """

    name: str
    preset: str
    device: str
    dtype: str
    num_devices: int
    strategy: str | None
    seq_len: int
    micro_batch: int
    global_batch: int
    flops_per_token: float
    flops_per_token_causal: float
    tokens_per_s: float | None = None
    step_s: float | None = None
    step_s_rounds: list[float] = field(default_factory=list)
    spread: float | None = None
    ours_over_this: float | None = None
    overhead: float | None = None
    speedup: float | None = None
    efficiency: float | None = None
    mfu: float | None = None
    mfu_causal: float | None = None
    peak_mem_bytes: int | None = None
    compile_s: float | None = None
    data_wait: float | None = None
    skipped_steps: int | None = None
    checkpoint_s: float | None = None
    first_losses: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """What a step of one way of training spends on one part of it; ``share`` of the timed step."""

    name: str
    preset: str
    num_devices: int
    part: str
    ms: float
    share: float


def bench_train(request: TrainBench) -> dict[str, Any] | None:
    """Time every config.

    Returns:
        ``schema_version``, ``environment``, ``peak_flops`` (of one device in bfloat16; None where it is
        unknown), ``rows`` (``TrainRow``), ``parts`` (``PartRow``) and ``stopped``: the signal that ended it
        early, with what was measured until then, or None. None on every rank but 0.

    Raises:
        SinktrainError: something that cannot be timed as asked.
        Stopped: by a signal, under a strategy.
    """
    request = _checked(request)
    device = request.device
    starts_others = request.num_devices > 1 and not any(name in os.environ for name in RANK_VARIABLES)
    for config in request.configs:
        workload(request, config, Path())  # mistakes come before anything is timed
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        peak = peak_flops(device) if request.dtype == torch.bfloat16 else None
        # Each alone before any other process is there: Lightning would wait for it in single-device runs.
        alone = [_rows_alone(request, config, peak) if starts_others else [] for config in request.configs]
        timed: list[Timed] = []
        with _signals_stop(request.strategy is None):
            for config in request.configs:
                timed.append(_timed(request, config, peak))
                if timed[-1].stopped:
                    break
    rows = [
        row
        for single, together in zip(alone, timed, strict=False)
        for row in (*single, *_with_efficiency(together.rows, single))
    ]
    if not is_rank_zero():
        return None
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(device)
        | {name: package_version(name) for name in ("lightning", "litgpt")},
        "peak_flops": peak,
        "rows": [asdict(row) for row in rows],
        "parts": [asdict(row) for one in timed for row in one.parts],
        "stopped": timed[-1].stopped if timed else None,
    }


# -- what is asked --------------------------------------------------------------------------------


def _checked(request: TrainBench) -> TrainBench:
    """The request with its strategy."""
    check_timed(request.device)
    if request.dtype not in PRECISION:
        raise ConfigError(
            f"--dtype {dtype_name(request.dtype)}: training is timed in bfloat16 or float32; use one of them"
        )
    strategy = request.strategy or ("ddp" if request.num_devices > 1 else None)
    if strategy is not None and strategy not in strategies():
        raise ConfigError(
            f'--strategy "{strategy}" is no overlay{did_you_mean(strategy, strategies())}; '
            f"there are {', '.join(strategies())}"
        )
    if strategy is not None and (request.use_peers or request.kinds):
        raise ConfigError(f"--peers and --kinds are timed on one device; leave them out with {strategy}")
    if strategy is not None and request.device.index is not None:
        raise ConfigError(
            f"--device {request.device} is one device; use {request.device.type} with {strategy}"
        )
    return replace(request, strategy=strategy)


def strategies() -> list[str]:
    """The shipped overlays that choose how devices work together."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(config_folder().glob("*.yaml"))}
    return [name for name, text in texts.items() if "strategy" in (yaml.safe_load(text).get("trainer") or {})]


def workload(request: TrainBench, config: str, folder: Path) -> Workload:
    """What a config's contenders compute: the sizes asked for, or those that suit device and config.

    Raises:
        ConfigError: the global batch does not divide into devices and micro-batches.
    """
    kind, num_devices = request.device.type, request.num_devices
    work = Workload(
        config=config,
        device=request.device,
        dtype=request.dtype,
        seq_len=request.seq_len or SEQ_LEN[kind],
        micro_batch=request.micro_batch,
        global_batch=request.global_batch,
        num_devices=num_devices,
        strategy=request.strategy,
        num_steps=request.num_steps or NUM_STEPS[kind],
        num_rounds=request.num_rounds,
        folder=folder,
    )
    usual = SMALLER_MICRO_BATCH.get(work.preset, MICRO_BATCH[kind]) if kind == "cuda" else MICRO_BATCH[kind]
    micro_batch = work.micro_batch or usual
    global_batch = work.global_batch or ACCUMULATED * micro_batch * num_devices
    if global_batch % (micro_batch * num_devices):
        raise ConfigError(
            f"--global-batch {global_batch} does not divide into {num_devices} "
            f"device{'s' if num_devices > 1 else ''} x micro-batches of {micro_batch}; "
            f"use a multiple of {micro_batch * num_devices}"
        )
    return replace(work, micro_batch=micro_batch, global_batch=global_batch)


# -- rounds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """What is told of a config; ``stopped`` by which signal, if by any."""

    rows: list[TrainRow]
    parts: list[PartRow]
    stopped: int | None


def _timed(request: TrainBench, config: str, peak: float | None) -> Timed:
    with _on_shards(request, config) as work:
        ours = OurTraining(work, OURS, times_checkpoint=True)
        contenders: list[Contender] = [ours, *_others(work, request, ours)]
        stopped = None
        try:
            _take_turns(contenders, work)
        except Stopped as stop:
            if work.strategy is not None:
                raise
            stopped = stop.signum
            _tell_unmeasured(contenders, f"not measured: {stop}")
        return Timed(_rows(work, ours, contenders, peak), list(_part_rows(work, contenders)), stopped)


@contextlib.contextmanager
def _signals_stop(is_alone: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise ``Stopped`` where they come; several ranks leave that to ``StopOnSignal``."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    signums = (
        (signal.SIGINT, signal.SIGTERM)
        if is_alone and threading.current_thread() is threading.main_thread()
        else ()
    )
    previous = {signum: signal.signal(signum, stop) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _rows_alone(request: TrainBench, config: str, peak: float | None) -> list[TrainRow]:
    """One device with its share of the global batch, before others join it."""
    with _on_shards(request, config) as work:
        share = work.global_batch // work.num_devices
        single = replace(work, num_devices=1, strategy=None, global_batch=share)
        ours = OurTraining(single, f"{OURS}, one device", is_profiled=False)
        _take_turns([ours], single)
        return _rows(single, ours, [ours], peak)


@contextlib.contextmanager
def _on_shards(request: TrainBench, config: str) -> Iterator[Workload]:
    """The workload of a config, with random shards in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="sinktrain-bench-") as folder:
        work = workload(request, config, Path(folder))
        num_tokens = NUM_BATCHES * work.global_batch * work.seq_len + 1
        write_random_shards(work.folder, num_tokens, held_out=work.seq_len + 1)
        yield work


def _others(work: Workload, request: TrainBench, ours: OurTraining) -> Iterator[Contender]:
    for kind in request.kinds:
        yield OurTraining(work, f"{OURS}, {kind}", ["--model.sink.kind", kind], is_profiled=False)
    for peer in PEERS if request.use_peers else ():
        yield PeerTraining(work, peer, ours)


def _take_turns(contenders: Sequence[Contender], work: Workload) -> None:
    """Round after round; a contender that fails says so in its records, and leaves."""
    going = list(contenders)
    for number in range(0, work.num_rounds, work.num_rounds if work.strategy else 1):
        for contender in list(going):
            caught = torch.OutOfMemoryError if isinstance(contender, OurTraining) else Exception
            try:
                contender.run(number)
            except caught as error:
                is_told = isinstance(error, SinktrainError)
                told = str(error) if is_told else f"failed: {type(error).__name__}: {first_line(error)}"
                for record in contender.records:
                    record.note, record.step_s = told, []
                going.remove(contender)
                contender.release()
            if work.device.type == "cuda":
                release_memory(work.device)
    torch.compiler.reset()  # what is compiled counts against dynamo's limit, which the next config would meet


def _tell_unmeasured(contenders: Sequence[Contender], note: str) -> None:
    for record in (record for contender in contenders for record in contender.records):
        if not record.step_s:
            record.note = note


# -- rows -----------------------------------------------------------------------------------------


def _rows(
    work: Workload, ours: OurTraining, contenders: Sequence[Contender], peak: float | None
) -> list[TrainRow]:
    """A row for each record, the first that of ours under the Trainer."""
    rows: list[TrainRow] = []
    for contender in contenders:
        rows += [_row(work, ours.config, record, peak) for record in contender.records]
        if isinstance(contender, OurTraining):
            rows[-2] = replace(rows[-2], overhead=_overhead(contender))
    return [replace(row, ours_over_this=_ratio(rows[0].tokens_per_s, row.tokens_per_s)) for row in rows]


def _overhead(ours: OurTraining) -> float | None:
    pairs = zip(ours.trained.step_s, ours.bare.step_s, strict=False)  # one may have been stopped
    excess = [trained / bare - 1 for trained, bare in pairs]
    return _median(excess)


def _row(work: Workload, config: ModelConfig, record: Record, peak: float | None) -> TrainRow:
    step_s = _median(record.step_s)
    flops, flops_causal = (
        flops_per_token(config.network, config.vocab_size, work.seq_len, is_causal)
        for is_causal in (False, True)
    )
    tokens_per_s = _ratio(work.global_batch * work.seq_len, step_s)
    per_device = _ratio(tokens_per_s, work.num_devices)
    return TrainRow(
        name=record.name,
        **work.facts,
        flops_per_token=flops,
        flops_per_token_causal=flops_causal,
        tokens_per_s=tokens_per_s,
        step_s=step_s,
        step_s_rounds=record.step_s,
        spread=None if step_s is None else (max(record.step_s) - min(record.step_s)) / step_s,
        mfu=None if per_device is None else _ratio(per_device * flops, peak),
        mfu_causal=None if per_device is None else _ratio(per_device * flops_causal, peak),
        peak_mem_bytes=None if step_s is None else record.peak_mem_bytes,
        compile_s=_compile_s(work, record),
        data_wait=_median(record.data_wait),
        skipped_steps=record.skipped_steps,
        checkpoint_s=record.checkpoint_s,
        first_losses=record.first_losses,
        note=record.note,
    )


def _compile_s(work: Workload, record: Record) -> float | None:
    step_s = _median(record.step_s)
    if step_s is None or record.warm_up_s is None:
        return None
    return max(0.0, record.warm_up_s - work.warm_up * step_s)


def _part_rows(work: Workload, contenders: Sequence[Contender]) -> Iterator[PartRow]:
    for record in (record for contender in contenders for record in contender.records):
        step_s = _median(record.step_s)
        for part, ms in record.parts.items():
            if step_s is not None and ms > 0:
                yield PartRow(
                    name=record.name,
                    preset=work.preset,
                    num_devices=work.num_devices,
                    part=part,
                    ms=ms,
                    share=ms / 1e3 / step_s,
                )


def _with_efficiency(rows: list[TrainRow], alone: list[TrainRow]) -> list[TrainRow]:
    """The Trainer's rows of all devices, and the bare loop's, against those of one device."""
    if not alone:
        return rows
    speedups = [_ratio(row.tokens_per_s, one.tokens_per_s) for row, one in zip(rows, alone, strict=True)]
    return [
        replace(row, speedup=speedup, efficiency=_ratio(speedup, row.num_devices))
        for row, speedup in zip(rows, speedups, strict=True)
    ]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or to is None else value / to
