"""How fast a model decodes: our decoder, the floor under it, and its peers, timed in one run.

The ring is full before the clock starts, and every way of decoding takes the most probable token
and feeds it. On CUDA the floor of a step is the bytes that it must read (every weight but the
embedding's, K and V of all slots) over the bandwidth of a large copy, measured in the same run. On
the CPU it is the step's matrix products alone, timed in turn with the decoder so that both meet the
same noise.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from sinktrain.errors import ConfigError, SinktrainError, did_you_mean, first_line
from sinktrain.evaluation.latency import with_positions
from sinktrain.evaluation.timing import (
    check_timed,
    held_bytes,
    peak_bytes,
    release_memory,
    reset_peak,
    times_ms,
)
from sinktrain.experiments.contenders import (
    MATMULS,
    OVERFILL_TOKENS,
    SEED,
    Cell,
    Contender,
    generate_contender,
    matmuls_contender,
    peer_contender,
    step_bytes,
    step_contender,
)
from sinktrain.experiments.machine import copy_bandwidth, environment
from sinktrain.experiments.peers import PEERS, Peer, RecomputePeer
from sinktrain.model.checkpoints import describe, load_model
from sinktrain.model.config import PYTHIA, ModelConfig
from sinktrain.model.init import initialize
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.layout import Layout, stream_layout

SCHEMA_VERSION = 1
PRESETS = {name.removeprefix("pythia-"): network for name, network in PYTHIA.items()}
Bar: TypeAlias = "tqdm[Any]"
Maker: TypeAlias = Callable[[Cell], Contender]

BURST_TOKENS = 16
"""On the CPU: tokens that one contender decodes before it is the next one's turn."""
WARM_UP_TOKENS = {"cpu": 8, "cuda": 32}
RECOMPUTED_TOKENS = {"cpu": 4, "cuda": 50}
PEERS_SHARE = 4
"""Peers are timed over this part of our tokens, because they are slow."""
FIRST_MARK, MARK_TOKENS = 2_000, 1_000
"""The first stream position that a trace tells of, and how many tokens before each it looks at."""


@dataclass(frozen=True)
class DecodeBench:
    """What to time: each model with each layout and batch size.

    Args:
        presets: sizes of Pythia with random weights, such as ``160m``; speed does not depend on values.
        model: a checkpoint instead of presets.
        layouts: ``1+1023`` when empty, for a checkpoint the one that it streams with.
        batch_sizes: streams decoded side by side.
        num_tokens: timed for each; in a trace, the last stream position.
        use_peers: time the peers too, and the paper's table of recomputation.
        recompute_windows: cache sizes of that table.
        is_trace: follow one long stream instead.
    """

    presets: Sequence[str] = ()
    model: str | None = None
    layouts: Sequence[Layout] = ()
    batch_sizes: Sequence[int] = (1,)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    num_tokens: int = 256
    use_peers: bool = False
    recompute_windows: Sequence[int] = ()
    is_trace: bool = False


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """What every row says of its cell: ``Cell.facts``."""

    preset: str
    device: str
    dtype: str
    sinks: int
    window: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class BenchRow(CellRow):
    """One way of decoding in one cell; None where it was not measured, and ``note`` says why."""

    name: str
    ms_per_token_p50: float | None = None
    ms_per_token_p95: float | None = None
    tokens_per_s: float | None = None
    cache_bytes: int | None = None
    peak_mem_bytes: int | None = None
    floor_ms: float | None = None
    ratio_to_floor: float | None = None
    stream_pos: int | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RecomputeRow(CellRow):
    """The paper's comparison: the window anew for every token, and streaming, with as many keys."""

    recompute_ms_p50: float | None = None
    streaming_ms_p50: float | None = None
    ratio: float | None = None
    note: str = ""


@torch.no_grad()
def bench_decode(request: DecodeBench) -> dict[str, Any]:
    """Time every cell.

    Returns:
        ``schema_version``, ``environment``, ``bandwidth_bytes_per_s`` (None on the CPU), ``rows``
        (``BenchRow``) and ``recompute`` (``RecomputeRow``).

    Raises:
        SinktrainError: an unknown preset, or something that cannot be timed as asked.
    """
    _check(request)
    device = request.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
        rows: list[BenchRow] = []
        recompute: list[RecomputeRow] = []
        for preset, loaded in _models(request):
            layouts = request.layouts or [stream_layout(loaded.config) if request.model else Layout(1, 1023)]
            sizes = [layout.num_slots for layout in layouts] + list(request.recompute_windows)
            model = with_positions(loaded, max(sizes))
            for layout in layouts:
                for batch_size in request.batch_sizes:
                    cell = Cell(preset, model, layout, batch_size)
                    rows += _trace(cell, request, bandwidth) if request.is_trace else []
                    rows += [] if request.is_trace else _cell_rows(cell, request, bandwidth)
            recompute += [
                _recompute_row(preset, model, size, request.num_tokens) for size in request.recompute_windows
            ]
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(device),
        "bandwidth_bytes_per_s": bandwidth,
        "rows": [asdict(row) for row in rows],
        "recompute": [asdict(row) for row in recompute],
    }


# -- models ---------------------------------------------------------------------------------------


def preset_name(typed: str) -> str:
    """``160m`` for ``160m`` or ``pythia-160m``.

    Raises:
        ConfigError: there is none of this name.
    """
    name = typed.strip().removeprefix("pythia-")
    if name not in PRESETS:
        raise ConfigError(f'no preset "{typed}"{did_you_mean(name, PRESETS)}; there are {", ".join(PRESETS)}')
    return name


def preset_model(name: str, device: torch.device, dtype: torch.dtype) -> GPTNeoX:
    """A Pythia with seeded random weights."""
    with torch.device(device):
        model = GPTNeoX(ModelConfig(PRESETS[name]))
    model = model.to(device, dtype)
    initialize(model, SEED)
    return model.eval().requires_grad_(False)


def timed_models(
    checkpoint: str | None, presets: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, GPTNeoX]]:
    """The checkpoint, if there is one, and then the presets, each with its name."""
    if checkpoint is not None:
        yield describe(checkpoint).name, load_model(checkpoint, device, dtype)
    for name in presets:
        with _bar(f"{name}: random weights"):
            model = preset_model(name, device, dtype)
        yield name, model


def _models(request: DecodeBench) -> Iterator[tuple[str, GPTNeoX]]:
    return timed_models(request.model, request.presets, request.device, request.dtype)


def _check(request: DecodeBench) -> None:
    check_timed(request.device)
    if not request.is_trace:
        return
    num_cells = len(request.presets or [request.model]) * max(1, len(request.layouts))
    if num_cells * len(request.batch_sizes) > 1 or request.use_peers:
        raise ConfigError(
            "--trace follows one stream; give one preset, layout and batch size, and no --peers"
        )


# -- cells ----------------------------------------------------------------------------------------


def _cell_rows(cell: Cell, request: DecodeBench, bandwidth: float | None) -> list[BenchRow]:
    floor_ms = _floor_ms(cell, bandwidth)
    rows: list[BenchRow] = []
    for makers in _our_makers(cell.device):
        time_them = partial(_timed_ours, cell, makers, request.num_tokens, floor_ms)
        rows += _told(cell, _name(makers[0]), torch.OutOfMemoryError, time_them)
    for peer in PEERS if request.use_peers else ():
        rows.append(_peer_row(cell, peer, request.num_tokens, floor_ms))
    return rows


def _our_makers(device: torch.device) -> list[list[Maker]]:
    """What is timed together: on the CPU everything, in turn; on CUDA one by one, for its memory's sake."""
    ours: list[Maker] = [generate_contender, step_contender]
    return [[*ours, matmuls_contender]] if device.type == "cpu" else [[make] for make in ours]


def _timed_ours(
    cell: Cell, makers: Sequence[Maker], num_tokens: int, floor_ms: float | None
) -> list[BenchRow]:
    with _bar(f"{cell}: {', '.join(map(_name, makers))}") as bar:
        return _timed(cell, [make(cell) for make in makers], num_tokens, floor_ms, bar)


def _name(make: Maker) -> str:
    return make.__name__.removesuffix("_contender")


def _peer_row(cell: Cell, peer_type: type[Peer], num_tokens: int, floor_ms: float | None) -> BenchRow:
    """Time a peer; whatever goes wrong with it is told in its row."""
    time_it = partial(_timed_peer, cell, peer_type, num_tokens, floor_ms)
    try:
        return _told(cell, peer_type.name, Exception, time_it)[0]
    finally:
        if peer_type.is_compiled:  # it counts against dynamo's limit, which a later cell would meet
            torch.compiler.reset()


def _told(
    cell: Cell, name: str, caught: type[Exception], time_them: Callable[[], list[BenchRow]]
) -> list[BenchRow]:
    """The rows, or one that says what was caught instead."""
    try:
        return time_them()
    except caught as error:
        is_ours = isinstance(error, SinktrainError)
        note = str(error) if is_ours else f"failed: {type(error).__name__}: {first_line(error)}"
        return [BenchRow(name=name, **cell.facts, note=note)]
    finally:
        release_memory(cell.device)


def _timed_peer(cell: Cell, peer_type: type[Peer], num_tokens: int, floor_ms: float | None) -> list[BenchRow]:
    with _bar(f"{cell}: {peer_type.name}") as bar:
        peer = peer_type(cell.model, cell.layout, cell.batch_size)
        warm_up, timed = _peer_tokens(peer, cell.device, num_tokens)
        contenders = [peer_contender(cell, peer), *_floor_contenders(cell)]
        return _timed(cell, contenders, timed, floor_ms, bar, warm_up)[:1]


def _peer_tokens(peer: Peer, device: torch.device, num_tokens: int) -> tuple[int, int]:
    """Tokens to warm up with and to time."""
    if isinstance(peer, RecomputePeer):
        return 1, min(RECOMPUTED_TOKENS[device.type], num_tokens)
    warm_up, num_tokens = WARM_UP_TOKENS[device.type], max(1, num_tokens // PEERS_SHARE)
    if peer.max_tokens is not None:
        warm_up = min(warm_up, peer.max_tokens // 2)
        num_tokens = min(num_tokens, peer.max_tokens - warm_up)
    return warm_up, num_tokens


def _recompute_row(preset: str, model: GPTNeoX, num_slots: int, num_tokens: int) -> RecomputeRow:
    """Recomputation against streaming with as many keys, one stream each as in the paper."""
    sinks = min(1, num_slots - 1)
    cell = Cell(preset, model, Layout(sinks, num_slots - sinks), batch_size=1)
    slow = _peer_row(cell, RecomputePeer, num_tokens, None)
    if slow.ms_per_token_p50 is None:
        return RecomputeRow(**cell.facts, note=slow.note)
    with _bar(f"{cell}: generate") as bar:
        timed = max(1, num_tokens // PEERS_SHARE)
        fast = _timed(cell, [generate_contender(cell)], timed, None, bar)[0]
    assert fast.ms_per_token_p50 is not None
    return RecomputeRow(
        **cell.facts,
        recompute_ms_p50=slow.ms_per_token_p50,
        streaming_ms_p50=fast.ms_per_token_p50,
        ratio=slow.ms_per_token_p50 / fast.ms_per_token_p50,
    )


# -- a long stream --------------------------------------------------------------------------------


def trace_marks(last: int) -> list[int]:
    """Stream positions to tell of: 2,000, the powers of ten from 10,000 on, and the last."""
    powers = [10**exponent for exponent in range(4, len(str(last)))]
    return [mark for mark in (FIRST_MARK, *powers) if mark < last] + [last]


def _trace(cell: Cell, request: DecodeBench, bandwidth: float | None) -> list[BenchRow]:
    """Rows of one stream, each over the tokens just before its position, with the memory held there."""
    warm_up = WARM_UP_TOKENS[cell.device.type]
    begins_at = cell.layout.num_slots + OVERFILL_TOKENS + warm_up
    if request.num_tokens <= begins_at:
        raise ConfigError(
            f"--trace times nothing before position {begins_at}, when {cell.layout} is full; "
            f"use more than --tokens {request.num_tokens}"
        )
    rows: list[BenchRow] = []
    floor_ms = _floor_ms(cell, bandwidth)
    marks = trace_marks(request.num_tokens)
    with _bar(f"{cell}: trace") as bar:
        stream = generate_contender(cell)
        contenders = [stream, *_floor_contenders(cell)]
        _warm_up(contenders, warm_up)
        num_others = (len(contenders) - 1) * MARK_TOKENS * len(marks)
        bar.reset(total=request.num_tokens - begins_at + num_others)
        for mark in marks:
            assert stream.stream_pos is not None
            for _ in range(mark - MARK_TOKENS - stream.stream_pos):
                stream.decode()
                bar.update()
            if stream.stream_pos < mark:
                [row, *_] = _measured(cell, contenders, mark - stream.stream_pos, floor_ms, bar)
                rows.append(replace(row, peak_mem_bytes=held_bytes(cell.device)))
    return rows


# -- timing ---------------------------------------------------------------------------------------


def _floor_ms(cell: Cell, bandwidth: float | None) -> float | None:
    """Of a step on CUDA; None on the CPU, where it is timed: see ``_floor_contenders``."""
    return step_bytes(cell) / bandwidth * 1e3 if bandwidth else None


def _floor_contenders(cell: Cell) -> list[Contender]:
    """On the CPU the matrix products alone, which go in turn with whatever is timed."""
    return [matmuls_contender(cell)] if cell.device.type == "cpu" else []


def _timed(
    cell: Cell,
    contenders: Sequence[Contender],
    num_tokens: int,
    floor_ms: float | None,
    bar: Bar,
    warm_up: int | None = None,
) -> list[BenchRow]:
    """Warm up, then time; arguments and rows as ``_measured``."""
    bar.reset(total=num_tokens * len(contenders))
    _warm_up(contenders, WARM_UP_TOKENS[cell.device.type] if warm_up is None else warm_up)
    reset_peak(cell.device)
    return _measured(cell, contenders, num_tokens, floor_ms, bar)


def _warm_up(contenders: Sequence[Contender], num_tokens: int) -> None:
    for contender in contenders:
        for _ in range(num_tokens):
            contender.decode()


def _measured(
    cell: Cell, contenders: Sequence[Contender], num_tokens: int, floor_ms: float | None, bar: Bar
) -> list[BenchRow]:
    """Time ``num_tokens`` of each contender, on the CPU in turn; one row for each.

    Args:
        floor_ms: None takes the time of the matrix products, if they are among the contenders.
    """
    burst = BURST_TOKENS if cell.device.type == "cpu" else num_tokens
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for done in range(0, num_tokens, burst):
        for contender in contenders:
            times[contender.name] += times_ms(
                contender.decode, min(burst, num_tokens - done), cell.device, bar.update
            )
    if floor_ms is None and MATMULS in times:
        floor_ms = statistics.median(times[MATMULS])
    peak = peak_bytes(cell.device)
    return [_row(cell, contender, times[contender.name], floor_ms, peak) for contender in contenders]


def _row(
    cell: Cell, contender: Contender, times_ms: list[float], floor_ms: float | None, peak: int
) -> BenchRow:
    p50, p95 = (float(value) for value in np.percentile(times_ms, [50, 95]))
    return BenchRow(
        name=contender.name,
        **cell.facts,
        ms_per_token_p50=p50,
        ms_per_token_p95=p95,
        tokens_per_s=cell.batch_size * len(times_ms) / sum(times_ms) * 1e3,
        cache_bytes=contender.cache_bytes,
        peak_mem_bytes=peak,
        floor_ms=floor_ms,
        ratio_to_floor=p50 / floor_ms if floor_ms else None,
        stream_pos=contender.stream_pos,
        note=contender.note,
    )


def _bar(doing: str) -> Bar:
    return progress_bar(desc=doing, unit="tok")
