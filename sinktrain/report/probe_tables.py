"""The tables of what losses don't show: sinks in the network, answers, cost, exactness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from sinktrain.report import wording
from sinktrain.report.table import Table
from sinktrain.report.wording import Results, Row, printable, ratio_text, share_text

PROXY_NOTE = (
    "* A proxy: the weights of this kind add up to 1 over the tokens, and 1 - the mean of what its heads' "
    "outputs are multiplied by stands here. It is far from 0 untrained, too."
)

NORM_COLUMNS = {
    "hidden_norm_ratio": "norm of first / others",
    "kurtosis": "kurtosis",
    "kurtosis_without_first": "without first",
    "max_abs": "largest",
    "max_abs_without_first": "without first",
    "top1_over_median": "largest / median",
    "top1_over_median_without_first": "without first",
}


def where(rows: Iterable[Row], like: Row, keys: Sequence[str]) -> list[Row]:
    """The rows that are alike in some keys."""
    return [row for row in rows if all(row[key] == like[key] for key in keys)]


def untrained(rows: Iterable[Row], like: Row, keys: Sequence[str]) -> Row | None:
    """The row of the same network freshly initialised, if it was measured."""
    return next(iter(where(rows, {**like, "weights": "initial"}, ("model", "weights", *keys))), None)


def sink_rows(results: Results) -> list[Row]:
    """Of ``sink_metric[]``, trained: each model's own sinks or null slot, and its first text token."""
    trained = [row for row in results["sink_metric"] if row["weights"] == "trained"]
    kept = []
    for row in trained:
        first_text = min(
            (
                other["position"]
                for other in where(trained, row, ("model", "eps", "seq_len"))
                if not other["is_sink"] and not is_null(other)
            ),
            default=None,
        )
        if row["is_sink"] or is_null(row) or row["position"] == first_text:
            kept.append(row)
    return kept


def is_null(row: Row) -> bool:
    """Whether a row of ``sink_metric[]`` is about a null slot."""
    return int(row["position"]) < 0


def sink_table(results: Results) -> Table:
    """The sink metric and the attention mass at own sinks and the first text token, trained and initial."""
    return Table(
        [
            "model",
            "position",
            "sink metric",
            "untrained",
            "over",
            "mean mass",
            "untrained",
            "strongest head",
            "null mass",
            "untrained",
            "over",
        ],
        [
            [
                printable(row["model"]),
                place_words(row),
                share_text(row["value"]),
                "" if initial is None else share_text(initial["value"]),
                _sample_words(row),
                *_mass_cells(results, row),
            ]
            for row in sink_rows(results)
            for initial in [untrained(results["sink_metric"], row, ("eps", "seq_len", "position"))]
        ],
    )


def _sample_words(row: Row) -> str:
    """``64 x 100``: the length and the number of sequences that a figure is a mean over."""
    return f"{row['seq_len']:,} x {row['num_sequences']:,}"


def place_words(row: Row) -> str:
    """``sink``, ``null slot``, ``first text token``, with the position of a token where it is not 0."""
    if is_null(row):
        return "null slot"
    place = "sink" if row["is_sink"] else "first text token"
    return f"{place} ({row['position']})" if row["position"] else place


def _mass_cells(results: Results, row: Row) -> list[str]:
    """At a row's position: mean mass over heads, untrained, the strongest head; null mass, untrained."""
    at = row["position"]

    def mass(head: Row) -> float:
        return float(head["null_mass"] if is_null(row) else head["mass"][at])

    heads = [
        head for head in results["sink_attention"] if head["model"] == row["model"] and at < len(head["mass"])
    ]
    trained = [head for head in heads if head["weights"] == "trained"]
    initial = [head for head in heads if head["weights"] == "initial"]
    if not trained:
        return [""] * 6
    strongest = max(trained, key=mass)
    return [
        share_text(fmean(map(mass, trained))),
        share_text(fmean(map(mass, initial))) if initial else "",
        f"{share_text(mass(strongest))} (layer {strongest['layer']}, head {strongest['head']})",
        null_mass_text(trained),
        null_mass_text(initial) if initial else "",
        _sample_words(trained[0]),
    ]


def null_mass_text(heads: Sequence[Row]) -> str:
    """``31%``, the mean over rows of ``sink_attention[]``; ``48%*`` where it is a proxy."""
    return share_text(fmean(head["null_mass"] for head in heads)) + "*" * any(map(is_proxy, heads))


def is_proxy(head: Row) -> bool:
    """Whether what a row of ``sink_attention[]`` calls null mass is a proxy."""
    return bool(head.get("null_mass_is_proxy", False))


def norms_table(results: Results) -> Table:
    """Sizes and outliers of hidden states by layer, with and without the first position; untrained beside."""
    return Table(
        ["model", "layer", "over", *NORM_COLUMNS.values()],
        [
            [
                printable(row["model"]),
                str(row["layer"]),
                _sample_words(row),
                *(_with_untrained(row, initial, key) for key in NORM_COLUMNS),
            ]
            for row in results["norms"]
            if row["weights"] == "trained"
            for initial in [untrained(results["norms"], row, ("layer", "seq_len"))]
        ],
    )


def _with_untrained(row: Row, initial: Row | None, key: str) -> str:
    """``8.50 (1.00)``: the trained value, and the untrained one."""
    return ratio_text(row[key]) + ("" if initial is None else f" ({ratio_text(initial[key])})")


def streameval_table(results: Results) -> Table:
    """Accuracy by how many lines back the answer stands, with its interval; chance beside it."""
    distances = sorted({row["distance_lines"] for row in results["streameval"]})
    keys = ("task", "model", "policy", "sinks", "window")
    groups: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in results["streameval"]:
        group = groups.setdefault(tuple(row[key] for key in keys), {})
        group[row["distance_lines"]] = row
    return Table(
        ["task", "model", "layout", "chance", *(f"{wording.counted(lines, 'line')}" for lines in distances)],
        [
            [
                str(first["task"]),
                printable(first["model"]),
                wording.layout_name(first),
                share_text(first["chance"]),
                *(_accuracy_cell(group.get(lines)) for lines in distances),
            ]
            for group in groups.values()
            for first in [next(iter(group.values()))]
        ],
    )


def _accuracy_cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{share_text(row['accuracy'])} ({wording.share_interval_text(row)})"


def latency_table(results: Results) -> Table:
    """Milliseconds a token, median and 95th percentile, by stream position; memory at its end."""
    positions = sorted({row["stream_pos"] for row in results["latency"]})
    groups: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in results["latency"]:
        # dense has a window as long as its stream: one line for all of its positions
        layout = "dense" if row["policy"] == "dense" else wording.layout_name(row)
        group = groups.setdefault((row["model"], layout, row["batch"], row["device"]), {})
        group[row["stream_pos"]] = row
    return Table(
        [
            "model",
            "layout",
            "batch",
            *(f"at {position:,}, ms" for position in positions),
            "cache",
            "peak memory",
            "device",
        ],
        [
            [
                printable(str(model)),
                str(layout),
                str(batch),
                *(_latency_cell(group.get(position)) for position in positions),
                "" if last["cache_bytes"] is None else wording.bytes_text(last["cache_bytes"]),
                wording.bytes_text(last["peak_mem_bytes"]),
                printable(str(device)),
            ]
            for (model, layout, batch, device), group in groups.items()
            for last in [group[max(group)]]
        ],
    )


def _latency_cell(row: Row | None) -> str:
    """``0.614 (p95 0.725)``."""
    if row is None:
        return ""
    return f"{ratio_text(row['ms_per_token_p50'])} (p95 {ratio_text(row['ms_per_token_p95'])})"


def verified_table(results: Results) -> Table:
    """How far blockwise evaluation is from stepping token by token."""
    return Table(
        ["model", "text", "layout", "tokens", "largest logit difference", "dtype"],
        [
            [
                printable(row["model"]),
                printable(row["text"]),
                f"{row['sinks']}+{row['window']}",
                f"{row['num_tokens']:,}",
                f"{row['max_logit_diff']:.1e}",
                row["dtype"],
            ]
            for row in results["verified"]
        ],
    )
