"""What ``sinktrain bench`` prints: a table for each cell, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sinktrain.report.table import COLUMN_GAP, Table
from sinktrain.streaming.layout import Layout

CELL_FIELDS = ("preset", "dtype", "sinks", "window", "batch")
REFERENCE_TOKENS = 4_000_000
"""The table of ``bench evaluate`` says how long so many take."""


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


def _machine_line(environment: dict[str, Any]) -> str:
    """The device, and the versions of what ran on it."""
    versions = (
        f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment[name]
    )
    return ", ".join([environment["device"], *versions])


def _environment_lines(result: dict[str, Any]) -> str:
    known = result["environment"]
    bandwidth = result["bandwidth_bytes_per_s"]
    floor = (
        f"floor: weights and cache at {bandwidth / 1e12:.3f} TB/s, as a copy inside the device takes"
        if bandwidth
        else f"floor: the step's matrix products alone, timed in turn; threads: {known['num_threads']}"
    )
    return f"{_machine_line(known)}\n{floor}"


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


# -- evaluation -----------------------------------------------------------------------------------


def evaluate_table(result: dict[str, Any]) -> str:
    """What ``sinktrain bench evaluate`` prints: a table for each model, and notes below it."""
    size, rate = result["matmul_size"], result["matmul_flops_per_s"]
    product = f"as a product of {size} x {size} matrices takes"
    parts = [
        f"{_machine_line(result['environment'])}\n"
        f"floor: the operations needed at {rate / 1e12:,.3f} TFLOP/s, {product}"
    ]
    for name in dict.fromkeys((row["preset"], row["dtype"]) for row in result["rows"]):
        rows, tables = (
            [row for row in result[kind] if (row["preset"], row["dtype"]) == name]
            for kind in ("rows", "tables")
        )
        parts.append("\n".join([", ".join(name), *_scoring_lines(rows, tables)]))
    return "\n\n".join(parts)


def _scoring_lines(rows: list[dict[str, Any]], tables: list[dict[str, Any]]) -> Iterator[str]:
    header = ["", "tokens/s", "floor", "% of it", "x stepping", "x one stream", "memory MB", "at 1/4 length"]
    cells = [
        [
            str(Layout(row["sinks"], row["window"])),
            _number(row["tokens_per_s"], 0),
            _number(row["floor_tokens_per_s"], 0),
            _number(row["share_of_floor"], 1, 0.01),
            _number(row["ratio_to_step"], 1),
            _number(row["ratio_to_single_step"], 1),
            _number(row["peak_mem_bytes"], 1, 1e6),
            _number(row["quarter_peak_mem_bytes"], 1, 1e6),
        ]
        for row in rows
    ]
    yield from _aligned(Table(header, cells))
    for row in rows:
        yield f"  {Layout(row['sinks'], row['window'])}: {'; '.join(_scoring_facts(row))}"
    for table in tables:
        yield f"  {', '.join(table['layouts'])}: {_sweep_words(table)}"


def _scoring_facts(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['batch']} stream{'s' if row['batch'] > 1 else ''} of {row['stream_len']:,} tokens"
    if row["step_tokens_per_s"] is not None:
        yield f"stepping {row['step_tokens_per_s']:,.0f} tokens/s"
    if row["single_step_tokens_per_s"] is not None:
        yield f"one stream {row['single_step_tokens_per_s']:,.0f}"
    if row["max_loss_diff"] is not None:
        yield f"blocks and {row['num_checked']:,} steps differ by {row['max_loss_diff']:.1e} nats at most"
    if row["note"]:
        yield row["note"]


def _sweep_words(table: dict[str, Any]) -> str:
    if table["tokens_per_s"] is None:
        return str(table["note"])
    reference_s = REFERENCE_TOKENS / table["tokens_per_s"]
    return (
        f"{table['tokens_per_s']:,.0f} tokens/s through all of them, "
        f"{REFERENCE_TOKENS:,} tokens in {reference_s:,.1f} s"
    )


# -- training -------------------------------------------------------------------------------------


def train_table(result: dict[str, Any]) -> str:
    """What ``sinktrain bench train`` prints: for each config a table, notes, and the time by part."""
    known, peak = result["environment"], result["peak_flops"]
    versions = (f"{name} {known[name]}" for name in ("lightning", "litgpt") if known[name])
    told = "peak unknown: no MFU" if peak is None else f"peak: {peak / 1e12:,.1f} TFLOP/s in bfloat16"
    parts = [f"{', '.join([_machine_line(known), *versions])}\n{told}"]
    for preset in dict.fromkeys(row["preset"] for row in result["rows"]):
        rows, by_part = (
            [row for row in result[kind] if row["preset"] == preset] for kind in ("rows", "parts")
        )
        parts.append("\n".join([*_training_lines(rows), *_training_facts(rows)]))
        parts += ["\n".join(_part_lines(by_part))] if by_part else []
    return "\n\n".join(parts)


def _training_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _training_title(rows[-1])
    speed, costs = ["tokens/s", "ours x", "MFU %", "causal %", "ms/step", "spread %"], ["GiB", "compile s"]
    header = ["", *speed, *costs, "wait %"]
    cells = [
        [
            row["name"],
            _number(row["tokens_per_s"], 0),
            _number(row["ours_over_this"], 3),
            _number(row["mfu"], 1, 0.01),
            _number(row["mfu_causal"], 1, 0.01),
            _number(row["step_s"], 1, 1e-3),
            _number(row["spread"], 1, 0.01),
            _number(row["peak_mem_bytes"], 2, 2**30),
            _number(row["compile_s"], 1),
            _number(row["data_wait"], 2, 0.01),
        ]
        for row in rows
    ]
    yield from _aligned(Table(header, cells))


def _training_title(row: dict[str, Any]) -> str:
    devices = "1 device" if row["strategy"] is None else f"{row['num_devices']} devices by {row['strategy']}"
    return (
        f"{row['preset']}, {row['dtype']}, {devices}, sequence {row['seq_len']:,}, global batch "
        f"{row['global_batch']} in micro-batches of {row['micro_batch']}: "
        f"{row['global_batch'] * row['seq_len']:,} tokens a step"
    )


def _training_facts(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        facts = []
        if row["overhead"] is not None:
            cost = f"{100 * row['overhead']:.1f}%" if row["overhead"] > 0 else "nothing measurable"
            facts.append(f"Trainer and callbacks cost {cost} over the bare loop")
        if row["efficiency"] is not None:
            facts.append(f"{row['speedup']:.3f} x one device, efficiency {100 * row['efficiency']:.1f}%")
        if row["checkpoint_s"] is not None:
            facts.append(f"a checkpoint stops it for {row['checkpoint_s']:.2f} s")
        if row["skipped_steps"]:
            facts.append(f"{row['skipped_steps']} steps were skipped")
        if facts or row["note"]:
            yield f"  {row['name']}: {'; '.join([*facts, *([row['note']] if row['note'] else [])])}"


def _part_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Milliseconds of a step, and their share of it: a line for each part, the largest first."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = {(row["part"], row["name"]): f"{row['ms']:,.2f} ({100 * row['share']:.1f}%)" for row in rows}
    largest = sorted(rows, key=lambda row: row["ms"], reverse=True)
    parts = dict.fromkeys(row["part"] for row in largest)
    table = Table(
        ["time by part, ms a step", *names],
        [[part, *(cells.get((part, name), "") for name in names)] for part in parts],
    )
    yield from _aligned(table)


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    """Nothing for None."""
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _aligned(table: Table) -> Iterator[str]:
    """Names to the left, numbers to the right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    for name, *numbers in lines:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        yield COLUMN_GAP.join([name.ljust(widths[0]), *cells]).rstrip()
