"""How fast exact streaming evaluation is: tokens/s, the floor under it, and the ratio to stepping.

``stream_loss`` scores parallel streams of random tokens; what it gives is compared with the decoder's
steps first. The floor is what the floating-point operations that a token needs take at the rate of a
large matrix product, measured in the same run. Memory is told for streams of a quarter of the length
too, because it must not grow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sinktrain.errors import ConfigError, first_line
from sinktrain.evaluation.latency import with_positions
from sinktrain.evaluation.timing import check_timed, release_memory
from sinktrain.experiments.bench import timed_models
from sinktrain.experiments.bench_table import evaluate_table
from sinktrain.experiments.contenders import Cell
from sinktrain.experiments.machine import MATMUL_SIZE, environment, matmul_flops
from sinktrain.experiments.scoring import (
    FEWEST_WINDOWS,
    loss_difference,
    needed_flops,
    quarter,
    score,
    seconds_to_score,
    steps_per_s,
)
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.layout import SMALLEST_ROW, Layout, paper_row, stream_layout

__all__ = ["EvaluateBench", "EvaluateRow", "TableRow", "bench_evaluate", "evaluate_table"]

SCHEMA_VERSION = 1
NUM_TOKENS = 2**20
"""On CUDA: tokens of all streams; on the CPU as many as take ``CPU_SECONDS``."""
CPU_SECONDS = 3.0
MOST_STREAMS = {"cpu": 8, "cuda": 16}

Value = TypeVar("Value")


@dataclass(frozen=True)
class EvaluateBench:
    """What to time: each model with each layout, and with the paper's four of each of their sizes.

    Args:
        presets: sizes of Pythia with random weights, such as ``160m``; speed does not depend on values.
        model: a checkpoint instead of presets.
        layouts: ``1+1023`` when empty, for a checkpoint the one that it streams with.
        num_tokens: scored for each layout, over all streams; chosen by the device when 0.
        num_streams: parallel streams; when 0 as many as are four caches long, up to ``MOST_STREAMS``.
    """

    presets: Sequence[str] = ()
    model: str | None = None
    layouts: Sequence[Layout] = ()
    num_tokens: int = 0
    num_streams: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class EvaluateRow:
    """One model and layout; None where it could not be measured, and ``note`` says why.

    Args:
        batch: parallel streams.
        stream_len: tokens of each, sinks included.
        flops_per_token: needed, on average over the stream.
        floor_tokens_per_s: at the device's measured rate.
        share_of_floor: ``tokens_per_s`` over it.
        elapsed_s, peak_mem_bytes, quarter_peak_mem_bytes: as in ``Scored``.
        step_tokens_per_s: decoding token by token with as many streams, the cache full.
        max_loss_diff: largest difference, in nats, between blocks and ``num_checked`` steps of each of
            some streams.
    """

    preset: str
    device: str
    dtype: str
    sinks: int
    window: int
    batch: int
    stream_len: int
    flops_per_token: float
    floor_tokens_per_s: float
    tokens_per_s: float | None = None
    elapsed_s: float | None = None
    share_of_floor: float | None = None
    peak_mem_bytes: int | None = None
    quarter_peak_mem_bytes: int | None = None
    step_tokens_per_s: float | None = None
    ratio_to_step: float | None = None
    single_step_tokens_per_s: float | None = None
    ratio_to_single_step: float | None = None
    max_loss_diff: float | None = None
    num_checked: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Four layouts over the same tokens; ``tokens_per_s`` counts each token once."""

    preset: str
    device: str
    dtype: str
    layouts: list[str]
    batch: int
    stream_len: int
    tokens_per_s: float | None = None
    elapsed_s: float | None = None
    note: str = ""


@torch.no_grad()
def bench_evaluate(request: EvaluateBench) -> dict[str, Any]:
    """Time every model and layout.

    Returns:
        ``schema_version``, ``environment``, ``matmul_size``, ``matmul_flops_per_s``, ``rows``
        (``EvaluateRow``) and ``tables`` (``TableRow``).

    Raises:
        SinktrainError: an unknown preset, a device that is not timed, or too few tokens for a layout.
    """
    check_timed(request.device)
    device = request.device
    for layout in request.layouts if request.num_tokens else ():  # before anything is loaded or timed
        stream_shape(request, layout.num_slots, request.num_tokens)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        rate = matmul_flops(device, request.dtype)
        rows: list[EvaluateRow] = []
        tables: list[TableRow] = []
        for name, loaded in timed_models(request.model, request.presets, device, request.dtype):
            layouts = request.layouts or [stream_layout(loaded.config) if request.model else Layout(1, 1023)]
            sizes = list(dict.fromkeys(layout.num_slots for layout in layouts))
            model = with_positions(loaded, max(sizes))
            for size in sizes:
                num_tokens = request.num_tokens or _num_tokens(model, size)
                num_streams, stream_len = stream_shape(request, size, num_tokens)
                tokens = Cell(name, model, Layout(0, size), num_streams).prompt(stream_len)
                cells = [Cell(name, model, one, num_streams) for one in layouts if one.num_slots == size]
                rows += [_row(cell, tokens, rate) for cell in cells]
                tables += [_table_row(cells[0], tokens)] if size >= SMALLEST_ROW else []
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(device),
        "matmul_size": MATMUL_SIZE[device.type],
        "matmul_flops_per_s": rate,
        "rows": [asdict(row) for row in rows],
        "tables": [asdict(row) for row in tables],
    }


def stream_shape(request: EvaluateBench, num_slots: int, num_tokens: int) -> tuple[int, int]:
    """How many streams to score, and how long they are.

    Raises:
        ConfigError: as many tokens as asked for do not fill so many streams.
    """
    roomy = max(1, min(MOST_STREAMS[request.device.type], num_tokens // (4 * num_slots)))
    num_streams, shortest = request.num_streams or roomy, FEWEST_WINDOWS * num_slots
    stream_len = num_tokens // num_streams
    if stream_len >= shortest:
        return num_streams, stream_len
    if request.num_tokens:
        raise ConfigError(
            f"--tokens {num_tokens} over {num_streams} streams are {stream_len} each, too few for a cache of "
            f"{num_slots}; use --tokens {shortest * num_streams} or more"
        )
    return num_streams, shortest


def _num_tokens(model: GPTNeoX, num_slots: int) -> int:
    """As many as the device scores in a reasonable time."""
    if model.device.type == "cuda":
        return NUM_TOKENS
    cell = Cell("", model, Layout(0, num_slots), batch_size=1)
    tokens = cell.prompt(max(2, num_slots))
    return int(CPU_SECONDS / seconds_to_score(cell, [cell.layout], tokens) * tokens.numel())


# -- rows -----------------------------------------------------------------------------------------


def _row(cell: Cell, tokens: Tensor, rate: float) -> EvaluateRow:
    """Check, then time; ``tokens`` int64[batch, stream_len], ``rate`` FLOP/s."""
    notes: list[str] = []
    stream_len, single = tokens.shape[1], replace(cell, batch_size=1)
    flops = needed_flops(cell.model, cell.layout, stream_len)
    with progress_bar(desc=str(cell), total=4, unit="part") as bar:
        checked = _or_note(notes, "check", partial(loss_difference, cell), cell.device)
        bar.update()
        scored = _or_note(notes, "blocks", partial(score, cell, tokens), cell.device)
        bar.update()
        steps = _or_note(notes, "steps", partial(steps_per_s, cell), cell.device)
        bar.update()
        single_steps = (
            _or_note(notes, "single steps", partial(steps_per_s, single), cell.device)
            if cell.batch_size > 1
            else steps
        )
    tokens_per_s = None if scored is None else tokens.numel() / scored.elapsed_s
    max_loss_diff, num_checked = checked or (None, 0)
    return EvaluateRow(
        **cell.facts,
        stream_len=stream_len,
        flops_per_token=flops,
        floor_tokens_per_s=rate / flops,
        tokens_per_s=tokens_per_s,
        share_of_floor=_ratio(tokens_per_s, rate / flops),
        step_tokens_per_s=steps,
        ratio_to_step=_ratio(tokens_per_s, steps),
        single_step_tokens_per_s=single_steps,
        ratio_to_single_step=_ratio(tokens_per_s, single_steps),
        max_loss_diff=max_loss_diff,
        num_checked=num_checked,
        note="; ".join(notes),
        **(asdict(scored) if scored else {}),
    )


def _table_row(cell: Cell, tokens: Tensor) -> TableRow:
    """The paper's four layouts of the cell's size, one after the other."""
    layouts, notes = paper_row(cell.layout.num_slots), list[str]()
    names = [str(layout) for layout in layouts]

    def measure() -> float:
        seconds_to_score(cell, layouts, quarter(tokens))
        return seconds_to_score(cell, layouts, tokens)

    with progress_bar(desc=f"{cell.preset}: {', '.join(names)}", total=1, unit="table"):
        elapsed_s = _or_note(notes, "table", measure, cell.device)
    known = {key: cell.facts[key] for key in ("preset", "device", "dtype", "batch")}
    return TableRow(
        **known,
        layouts=names,
        stream_len=tokens.shape[1],
        tokens_per_s=_ratio(tokens.numel(), elapsed_s),
        elapsed_s=elapsed_s,
        note="; ".join(notes),
    )


def _or_note(notes: list[str], part: str, measure: Callable[[], Value], device: torch.device) -> Value | None:
    """What was measured; None, and a note, where it does not fit into memory."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        notes.append(f"{part}: {first_line(error)}")
        return None
    finally:
        if device.type == "cuda":
            release_memory(device)


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or to is None else value / to
