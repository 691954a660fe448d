"""What ``sinktrain bench`` prints: a table for each cell, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sinktrain.report.tables import COLUMN_GAP, Table
from sinktrain.streaming.layout import Layout

CELL_FIELDS = ("preset", "dtype", "sinks", "window", "batch")


def bench_table(result: dict[str, Any]) -> str:
    """What ``sinktrain bench decode`` prints: a table for each cell, notes below it, then recomputation."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cells.setdefault(tuple(row[name] for name in CELL_FIELDS), []).append(row)
    parts = [_environment_lines(result)]
    parts += [_cell_text(rows) for rows in cells.values()]
    if result["recompute"]:
        parts.append(_recompute_text(result["recompute"]))
    return "\n\n".join(parts)


def _environment_lines(result: dict[str, Any]) -> str:
    known = result["environment"]
    versions = ", ".join(
        f"{name} {known[name]}" for name in ("torch", "triton", "transformers") if known[name]
    )
    bandwidth = result["bandwidth_bytes_per_s"]
    floor = (
        f"floor: weights and cache at {bandwidth / 1e12:.3f} TB/s, as a copy inside the device takes"
        if bandwidth
        else f"floor: the step's matrix products alone, timed in turn; threads: {known['num_threads']}"
    )
    return f"{known['device']}, {versions}\n{floor}"


def _cell_text(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    layout = Layout(first["sinks"], first["window"])
    title = f"{first['preset']}, {first['dtype']}, {layout}, batch {first['batch']}"
    header = ["", "ms p50", "p95", "tokens/s", "x floor", "floor ms", "cache MB", "memory MB", "position"]
    cells = [
        [
            row["name"],
            _number(row["ms_per_token_p50"], 3),
            _number(row["ms_per_token_p95"], 3),
            _number(row["tokens_per_s"], 1),
            _number(row["ratio_to_floor"], 2),
            _number(row["floor_ms"], 3),
            _number(row["cache_bytes"], 1, 1e6),
            _number(row["peak_mem_bytes"], 1, 1e6),
            _number(row["stream_pos"], 0),
        ]
        for row in rows
    ]
    notes = dict.fromkeys(f"  {row['name']}: {row['note']}" for row in rows if row["note"])
    return "\n".join([title, *_aligned(Table(header, cells)), *notes, *_trace_lines(rows)])


def _trace_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How the end of a long stream compares with its beginning."""
    first, last = rows[0], rows[-1]
    if len(rows) > 1 and first["name"] == last["name"]:
        ratio = last["ms_per_token_p50"] / first["ms_per_token_p50"]
        grown = last["peak_mem_bytes"] - first["peak_mem_bytes"]
        yield (
            f"  token {last['stream_pos']:,} takes {ratio:.3f} of the time that token "
            f"{first['stream_pos']:,} takes, and {grown:+,} bytes of memory"
        )


def _recompute_text(rows: list[dict[str, Any]]) -> str:
    header = ["recompute, batch 1", "keys", "recompute ms", "streaming ms", "ratio"]
    cells = [
        [
            f"{row['preset']}, {row['dtype']}",
            _number(row["sinks"] + row["window"], 0),
            _number(row["recompute_ms_p50"], 2),
            _number(row["streaming_ms_p50"], 3),
            _number(row["ratio"], 1),
        ]
        for row in rows
    ]
    notes = dict.fromkeys(f"  {row['sinks'] + row['window']}: {row['note']}" for row in rows if row["note"])
    return "\n".join([*_aligned(Table(header, cells)), *notes])


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _aligned(table: Table) -> Iterator[str]:
    """Names to the left, numbers to the right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    for name, *numbers in lines:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        yield COLUMN_GAP.join([name.ljust(widths[0]), *cells]).rstrip()
