"""Time and memory of a token against the length of its stream, for each policy: the paper's Figure 10.

A stream of random tokens is fed up to a position and then token by token under the clock: a token in,
logits out. Neither the values nor the trained length matter to the clock, so streams may be longer than
those of the training.

- ``streaming``: our decoder; one layout for each N, because the cost does not depend on the sinks.
- ``dense``: our decoder with a window of as many tokens as the stream has at that position.
- ``recompute``: one forward pass, not compiled, over the newest N tokens (all, while there are fewer),
  with the head for the last one alone.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sinktrain.errors import ConfigError, first_line
from sinktrain.evaluation.perplexity import dense_bytes
from sinktrain.evaluation.timing import (
    check_timed,
    device_name,
    free_bytes,
    peak_bytes,
    release_memory,
    reset_peak,
    times_ms,
)
from sinktrain.model.attention import CausalAttention
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

POLICIES = ("streaming", "dense", "recompute")
SEED = 0
FIRST_POSITION = 64
NUM_WINDOWS = 4
"""Streams are followed to this many times the largest N."""
BUDGET_S = 45.0
NUM_BURSTS = 3
BURST_TOKENS = {"cpu": 16, "cuda": 64}
WARM_UP_TOKENS = {"cpu": 2, "cuda": 8}
FEEDING_GROWTH = 3
"""How much longer, about, feeding a stream twice as long takes: 2 to 4 times."""


@dataclass(frozen=True)
class Stream:
    """A stream fed up to a position: each call of ``step`` is one more token's work."""

    step: Callable[[], object]
    layout: Layout
    cache_bytes: int | None


@dataclass(frozen=True)
class _Series:
    """One line of the plot; ``follow`` gives the stream at a position, asked for in rising order."""

    policy: str
    layout: Layout
    positions: list[int]
    follow: Callable[[int], Stream]


@torch.no_grad()
def latency(
    model: GPTNeoX,
    layouts: Sequence[Layout],
    policies: Sequence[str],
    max_stream_len: int | None = None,
    budget_s: float = BUDGET_S,
) -> list[dict[str, Any]]:
    """Time single tokens at stream positions of powers of two, one stream at a time.

    Args:
        layouts: one of each N is timed, with as many sinks as the model needs or about that.
        policies: of ``streaming``, ``dense``, ``recompute``.
        max_stream_len: last position; four times the largest N when None.
        budget_s: seconds of feeding and timing, about, over all; compiling comes on top. Positions that
            do not fit into it, or into memory, are left out, and stderr tells.

    Returns:
        ``latency[]`` of ``results.json`` without ``model``. ``window`` of a dense row is its stream length.
        ``cache_bytes`` is what keys and values take, None for ``recompute``, which keeps none.
        ``peak_mem_bytes`` is the most held while the tokens were timed: on CUDA all that this process
        allocated there, weights included; on the CPU all that the process has in memory, Python and
        libraries included.

    Raises:
        ConfigError: no such policy, nothing to time, or a device that is not timed.
    """
    check_timed(model.device)
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown:
        raise ConfigError(f'no policy "{unknown[0]}"; there are {", ".join(POLICIES)}')
    if not layouts or not policies or (max_stream_len is not None and max_stream_len < 1):
        raise ConfigError(
            f"latency of {len(policies)} policies and {len(layouts)} layouts up to stream position "
            f"{max_stream_len} is nothing; use one or more of each"
        )
    largest = max(layout.num_slots for layout in layouts)
    positions = stream_positions(largest, max_stream_len or NUM_WINDOWS * largest)
    model = with_positions(model, max(largest, positions[-1]))
    series = [one for policy in policies for one in _series(policy, model, layouts, positions)]
    on_cuda = model.device.type == "cuda"
    rows: list[dict[str, Any]] = []
    with (
        torch.cuda.device(model.device) if on_cuda else nullcontext(),
        progress_bar(desc="latency", total=sum(len(one.positions) for one in series)) as bar,
    ):
        share_s = budget_s / len(series)
        while series:
            rows += _followed(series.pop(0), model.device, share_s, bar)  # which is gone before the next
            if on_cuda:
                release_memory(model.device)
    return rows


def stream_positions(num_slots: int, last: int) -> list[int]:
    """Powers of two, from well inside the cache on, and the last; each at least twice the one before."""
    first = min(FIRST_POSITION, max(8, num_slots // 2))
    powers = [2**exponent for exponent in range(last.bit_length()) if first <= 2**exponent <= last // 2]
    return [*powers, last]


def with_positions(model: GPTNeoX, num_positions: int) -> GPTNeoX:
    """The same weights under a config that allows so many positions: speed does not depend on training."""
    network = model.config.network
    if network.max_position_embeddings >= num_positions:
        return model
    longer = copy.copy(model)
    longer.config = replace(model.config, network=replace(network, max_position_embeddings=num_positions))
    return longer


# -- streams --------------------------------------------------------------------------------------


def _series(
    policy: str, model: GPTNeoX, layouts: Sequence[Layout], positions: list[int]
) -> Iterator[_Series]:
    if policy == "dense":
        yield _Series(policy, Layout(0, positions[-1]), positions, partial(_dense, model))
        return
    num_sinks = len(model.sink_ids)
    for size in sorted({layout.num_slots for layout in layouts}):
        if policy == "streaming":
            of_size = [layout for layout in layouts if layout.num_slots == size]
            layout = min(of_size, key=lambda one: abs(one.sinks - max(1, num_sinks)))
            yield _Series(policy, layout, positions, _streaming(model, layout, positions[-1]))
        else:
            sinks = min(num_sinks, size - 1)
            layout = Layout(sinks, size - sinks)
            # Full windows cost the same at every position: one of them, and the last, are timed.
            changing = [stream_pos for stream_pos in positions if stream_pos <= size]
            last = positions[-1:] if positions[-1] > size else []
            yield _Series(policy, layout, changing + last, partial(_recompute, model, layout))


def _streaming(model: GPTNeoX, layout: Layout, last: int) -> Callable[[int], Stream]:
    """One decoder that goes on from position to position."""
    tokens = _random_tokens(model, last)
    decoder: StreamingDecoder | None = None

    def follow(stream_pos: int) -> Stream:
        nonlocal decoder
        if decoder is None:
            decoder = StreamingDecoder(model, layout.sinks, layout.window, require_sink=False)
        fed = int(decoder.stream_pos[0])
        if fed < stream_pos:
            decoder.prefill(tokens[:, fed:stream_pos])
        return Stream(partial(decoder.step, tokens[:, -1]), layout, decoder.cache_bytes)

    return follow


def _dense(model: GPTNeoX, stream_pos: int) -> Stream:
    """A decoder that holds ``stream_pos`` tokens, of which each timed one lets go one."""
    layout = Layout(0, stream_pos)
    needed, free = dense_bytes(model, 1, stream_pos), free_bytes(model.device)
    if needed > free / 2:
        raise torch.OutOfMemoryError(f"the cache takes {needed / 2**30:.1f} GiB of {free / 2**30:.1f}")
    tokens = _random_tokens(model, stream_pos)
    decoder = StreamingDecoder(model, layout.sinks, layout.window, require_sink=False)
    decoder.prefill(tokens)
    return Stream(partial(decoder.step, tokens[:, -1]), layout, decoder.cache_bytes)


def _recompute(model: GPTNeoX, layout: Layout, stream_pos: int) -> Stream:
    tokens = _random_tokens(model, min(stream_pos, layout.num_slots))

    def step() -> Tensor:
        attend = CausalAttention(model.rotary_steps, tokens.shape[1], model.dtype)
        return model.logits(model.hidden(tokens, attend)[:, -1])

    return Stream(step, layout, None)


def _random_tokens(model: GPTNeoX, num_tokens: int) -> Tensor:
    """int64[1, num_tokens]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator).to(model.device)


# -- timing ---------------------------------------------------------------------------------------


def _followed(
    series: _Series, device: torch.device, allowed_s: float, bar: tqdm[Any]
) -> list[dict[str, Any]]:
    """Rows of one series, as far as time and memory allow."""
    timing_s = allowed_s / 2 / len(series.positions)
    rows: list[dict[str, Any]] = []
    spent_s = feeding_s = 0.0
    for stream_pos in series.positions:
        if rows and spent_s + FEEDING_GROWTH * feeding_s + timing_s > allowed_s:
            _tell_left_out(series, stream_pos, f"its share of the time is {allowed_s:.0f} s", bar)
            break
        started_at = time.perf_counter()
        try:
            stream = series.follow(stream_pos)
            if device.type == "cuda":
                torch.cuda.synchronize()
            feeding_s = time.perf_counter() - started_at
            times = _times_ms(stream.step, device, timing_s, stream_pos)
        except torch.OutOfMemoryError as error:
            _tell_left_out(series, stream_pos, first_line(error), bar)
            break
        spent_s += feeding_s + sum(times) / 1e3
        rows.append(_row(series.policy, stream, stream_pos, times, device))
        del stream  # before the next one is made
        bar.update()
    return rows


def _times_ms(
    step: Callable[[], object], device: torch.device, allowed_s: float, most_tokens: int
) -> list[float]:
    """Milliseconds of single tokens in a few bursts, after some that warm up; the peak begins after them."""
    warm_up = min(WARM_UP_TOKENS[device.type], max(1, most_tokens // 2))
    for _ in range(warm_up):  # on CUDA the first compiles kernels, the second captures the graph
        [token_ms] = times_ms(step, 1, device)
    affordable = int(allowed_s * 1e3 / token_ms / NUM_BURSTS)
    burst = max(1, min(BURST_TOKENS[device.type], (most_tokens - warm_up) // NUM_BURSTS, affordable))
    reset_peak(device)
    return [time_ms for _ in range(NUM_BURSTS) for time_ms in times_ms(step, burst, device)]


def _row(
    policy: str, stream: Stream, stream_pos: int, times: list[float], device: torch.device
) -> dict[str, Any]:
    p50, p95 = (float(value) for value in np.percentile(times, [50, 95]))
    return {
        "policy": policy,
        "sinks": stream.layout.sinks,
        "window": stream.layout.window,
        "batch": 1,
        "stream_pos": stream_pos,
        "ms_per_token_p50": p50,
        "ms_per_token_p95": p95,
        "peak_mem_bytes": peak_bytes(device),
        "cache_bytes": stream.cache_bytes,
        "device": device_name(device),
    }


def _tell_left_out(series: _Series, stream_pos: int, problem: str, bar: tqdm[Any]) -> None:
    name = series.policy if series.policy == "dense" else f"{series.policy} {series.layout}"
    message = f"latency: {name} left out from stream position {stream_pos} on: {problem}"
    bar.write(message, file=sys.stderr)  # print would end in the middle of the bar
