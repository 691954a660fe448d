"""A whole ``results.json``, made up by seeded arithmetic: every list filled, and its numbers agree."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import combinations
from typing import Any

Row = dict[str, Any]

LENGTHS = (32, 64)
SINKS = (0, 1, 2, 4)
STREAM_LEN = 4096
TOKENS_SCORED = 16_128
BYTES_PER_TOKEN = 3.9
STREAM_POS = [32.0 + 64 * bin_ for bin_ in range(STREAM_LEN // 64)]
NUM_LAYERS, NUM_HEADS = 2, 2
COST_OF_SLOTS = {
    "vanilla": {0: 0.0830, 1: 0.0112, 2: 0.0041, 4: 0.0},
    "sink": {0: 0.9240, 1: 0.0, 2: 0.0006, 4: 0.0011},
    "zero": {0: 1.2710, 1: 0.0231, 2: 0.0042, 4: 0.0},
    "gate": {0: 0.0014, 1: 0.0, 2: 0.0003, 4: 0.0001},
}
OWN_LOSS = {"vanilla": 4.1720, "sink": 4.1583, "zero": 4.1964, "gate": 4.1551}
KINDS = {"vanilla": "none", "sink": "token", "zero": "zero", "gate": "gate"}
CURVES = {"val/loss": 3.1, "stream/gap": 0.02, "sink/metric": 0.2}
"""What was measured in training, and about where it ended."""
NULL_MASS = {"zero": {"trained": 0.31, "initial": 0.04}, "gate": {"trained": 0.62, "initial": 0.5}}
"""By arm and weights; of the gate, a proxy."""


def example_results(
    texts: Iterable[str] = ("book.txt",), seeds: bool = False, arms: Iterable[str] = ("vanilla", "sink")
) -> dict[str, Any]:
    """Arms of two layers and two heads, in layouts of 32 and 64 slots, under all three policies.

    Args:
        texts: names of the texts that were scored.
        seeds: three seeds of each arm, compared over seeds besides, instead of one.
        arms: of ``KINDS``.
    """
    draw = random.Random(2309)
    models = [
        _model(arm, seed, f"{arm}-seed{seed}" if seeds else arm)
        for seed in ((1, 2, 3) if seeds else (1,))
        for arm in arms
    ]
    texts = list(texts)
    perplexity = [row for text in texts for model in models for row in _perplexities(model, text, draw)]
    paired = [row for text in texts for row in _pairs(models, perplexity, text, draw)]
    if seeds:
        paired += [row for text in texts for row in _over_seeds(models, paired, text)]
    return {
        "schema_version": 1,
        "environment": _environment(texts, models),
        "models": models,
        "perplexity": perplexity,
        "paired": paired,
        "arms": [row for text in texts for row in _arms(models, perplexity, text)] if seeds else [],
        "position_loss": [_position_loss(row, draw) for row in perplexity],
        "training": [_training(model, metric) for model in models for metric in CURVES],
        "latency": [row for model in models for row in _latencies(model, draw)],
        "sink_metric": [row for model in models for row in _sink_metrics(model, draw)],
        "sink_attention": [row for model in models for row in _attention(model, draw)],
        "norms": [row for model in models for row in _norms(model, draw)],
        "removal": [row for text in texts for model in models for row in _removals(model, text, perplexity)],
        "streameval": [row for model in models for row in _stream_evals(model)],
        "quantized": [
            row for text in texts for model in models for row in _quantized(model, text, perplexity)
        ],
        "zero_shot": [_zero_shot(model) for model in models],
        "zero_shot_paired": [_zero_shot_pair(b, a) for b, a in combinations(models, 2)],
        "verified": [row for text in texts for model in models for row in _verified(model, text, draw)],
        "failed": [{"model": "half-written", "error": "ModelError: model.safetensors is cut off"}],
    }


def _environment(texts: list[str], models: list[Row]) -> Row:
    return {
        "sinktrain": "0.3.0",
        "torch": "2.13.0",
        "python": "3.11.9",
        "device": "cpu (x86_64)",
        "dtype": "float32",
        "max_tokens": 20_000,
        "num_streams": 4,
        "started_at": "2026-11-22T06:00:00+00:00",
        "elapsed_s": 83.4,
        "texts": texts,
        "command": "sinktrain compare "
        + " ".join(model["source"] for model in models)
        + "".join(f" --text {text}" for text in texts)
        + " --policies streaming,dense,recompute --out runs/compare",
    }


def _model(arm: str, seed: int, name: str) -> Row:
    is_sink = arm == "sink"
    return {
        "name": name,
        "source": f"runs/{name}",
        "parameters": 1_104_512 if is_sink else 1_104_384,
        "sink": {"kind": KINDS[arm], "count": int(is_sink), "token_ids": [512][:is_sink]},
        "sink_about": f"what {arm} is, in a clause",
        "tokens_seen": 3_276_800,
        "seed": seed,
        "arm": arm,
        "tokenizer": "ab" * 32,
        "trained_length": 128,
    }


# -- losses and their differences -------------------------------------------------------------------


def _perplexities(model: Row, text: str, draw: random.Random) -> list[Row]:
    own, of_text = model["sink"]["count"], 0.031 * (len(text) % 5)
    base = OWN_LOSS[model["arm"]] + of_text + draw.gauss(0, 0.004)
    shorter = {32: 0.1270, 64: 0.0}
    losses: dict[tuple[str, int, int], float] = {}
    for length in LENGTHS:
        for sinks in SINKS:
            cost = COST_OF_SLOTS[model["arm"]][sinks] * (0.9 + 0.2 * draw.random())
            loss = base + shorter[length] + cost
            losses["streaming", sinks, length - sinks] = loss
        losses["recompute", own, length - own] = base + shorter[length] - 0.0075
    losses["dense", 0, STREAM_LEN] = base + 0.6100
    return [
        {
            "model": model["name"],
            "text": text,
            "policy": policy,
            "sinks": sinks,
            "window": window,
            "tokens_scored": TOKENS_SCORED,
            "documents_scored": 120,
            "loss_nats": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / BYTES_PER_TOKEN,
            "ci95": [loss - 0.0412, loss + 0.0398],
        }
        for (policy, sinks, window), loss in losses.items()
    ]


def _pairs(models: list[Row], perplexity: list[Row], text: str, draw: random.Random) -> list[Row]:
    """Between models under one layout and where each keeps its own; within them over layouts, policies."""
    found = {
        (row["model"], row["policy"], row["sinks"], row["sinks"] + row["window"]): row
        for row in perplexity
        if row["text"] == text
    }
    rows = []
    for first, second in combinations(models, 2):
        for (name, *setting), row in found.items():
            other = found.get((first["name"], *setting))
            if name == second["name"] and other is not None:
                rows.append(_pair(row, other, draw))
        for length in LENGTHS if first["sink"]["count"] != second["sink"]["count"] else ():
            a, b = (
                found[model["name"], "streaming", model["sink"]["count"] or 4, length]
                for model in (second, first)
            )
            rows.append(_pair(a, b, draw) | _sides(a, b))
    for model in models:
        name, own = model["name"], model["sink"]["count"]
        for length in LENGTHS:
            kept = found[name, "streaming", 1, length]
            others = [found[name, "streaming", sinks, length] for sinks in (0, 2, 4)]
            rows += [_pair(other, kept, draw) | _sides(other, kept) for other in others]
            recomputed = found[name, "recompute", own, length]
            policies = {"a_policy": "recompute", "b_policy": "streaming"}
            rows.append(_pair(recomputed, kept, draw) | _sides(recomputed, kept) | policies)
    return rows


def _pair(a: Row, b: Row, draw: random.Random) -> Row:
    delta = a["loss_nats"] - b["loss_nats"]
    half = 0.0032 * (0.8 + 0.4 * draw.random())
    return {
        "a": a["model"],
        "b": b["model"],
        **{key: a[key] for key in ("text", "policy", "sinks", "window")},
        "delta_nats": delta,
        "ci95": [delta - half, delta + half],
        "p": math.erfc(abs(delta) / (half / 1.96) / math.sqrt(2)),
        "interval": "text",
    }


def _sides(a: Row, b: Row) -> Row:
    return {f"{side}_{key}": row[key] for side, row in (("a", a), ("b", b)) for key in ("sinks", "window")}


def _over_seeds(models: list[Row], paired: list[Row], text: str) -> list[Row]:
    """Means over the pairs of equal seeds, arm against arm or one arm in two layouts; 95% t intervals."""
    known = {model["name"]: model for model in models}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in paired:
        a, b = known[row["a"]], known[row["b"]]
        if row["text"] == text and a["seed"] == b["seed"]:
            rest = {key: value for key, value in row.items() if key not in {"a", "b", *_MEASURED}}
            key = (a["arm"], b["arm"], *sorted(rest.items()))
            groups.setdefault(key, []).append(row)
    return [_over_seeds_row(a, b, rows) for (a, b, *_), rows in groups.items()]


_MEASURED = ("delta_nats", "ci95", "p", "interval")


def _over_seeds_row(a: str, b: str, rows: list[Row]) -> Row:
    deltas = [row["delta_nats"] for row in rows]
    mean = sum(deltas) / len(deltas)
    error = math.sqrt(sum((delta - mean) ** 2 for delta in deltas) / (len(deltas) - 1) / len(deltas))
    half, t = 4.3027 * error, abs(mean) / error if error else math.inf  # 4.3027: t at 97.5%, 2 degrees
    return rows[0] | {
        "a": a,
        "b": b,
        "delta_nats": mean,
        "ci95": [mean - half, mean + half],
        "p": 1 - t / math.sqrt(2 + t * t) if t < math.inf else 0.0,  # Student's t with 2 degrees
        "interval": "seeds",
        "num_seeds": len(deltas),
        "deltas": deltas,
    }


def _arms(models: list[Row], perplexity: list[Row], text: str) -> list[Row]:
    """Means over three seeds; Student's t with 2 degrees, of the mean and of another seed."""
    arm_of = {model["name"]: model["arm"] for model in models}
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in perplexity:
        if row["text"] == text:
            key = (arm_of[row["model"]], row["policy"], row["sinks"], row["window"])
            groups.setdefault(key, []).append(row["loss_nats"])
    rows = []
    for (arm, policy, sinks, window), losses in groups.items():
        mean = sum(losses) / 3
        deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2)
        half, further = (4.3027 * deviation * math.sqrt(share) for share in (1 / 3, 4 / 3))
        rows.append(
            {"arm": arm, "text": text, "policy": policy, "sinks": sinks, "window": window, "num_seeds": 3}
            | {"loss_nats": mean, "deviation_nats": deviation}
            | {"ci95": [mean - half, mean + half], "prediction95": [mean - further, mean + further]}
        )
    return rows


def _position_loss(row: Row, draw: random.Random) -> Row:
    """The row's own loss from the first eviction on; before it, that of every row of its model."""
    length = row["sinks"] + row["window"]
    losses = []
    for pos in STREAM_POS:
        is_dense = row["policy"] == "dense"
        loss = row["loss_nats"] + (0.0003 * (pos - STREAM_LEN / 2) if is_dense else 0.0)
        if pos < length and not is_dense:
            loss = min(OWN_LOSS.values())
        losses.append(loss + 0.9 * math.exp(-pos / 40) + draw.gauss(0, 0.02))
    where = {key: row[key] for key in ("model", "text", "policy", "sinks", "window")}
    return {**where, "stream_pos": STREAM_POS, "loss_nats": losses}


def _training(model: Row, metric: str) -> Row:
    """Four measurements on the way to the row's end."""
    shares = [0.25, 0.5, 0.75, 1.0]
    where = {"model": model["name"], "metric": metric, "step": [int(400 * share) for share in shares]}
    return {
        **where,
        "tokens_seen": [int(model["tokens_seen"] * share) for share in shares],
        "train_seconds": [90.0 * share for share in shares],
        "hardware": {"device": "NVIDIA H100 80GB HBM3", "num_devices": 1, "train_seconds": 90.0},
        "value": [CURVES[metric] * (2 - share) + model["seed"] / 1000 for share in shares],
    }


def _removals(model: Row, text: str, perplexity: list[Row]) -> list[Row]:
    own = {
        (row["policy"], row["sinks"], row["window"]): row["loss_nats"]
        for row in perplexity
        if (row["model"], row["text"]) == (model["name"], text)
    }
    kept = model["sink"]["count"] or 4
    is_sink = model["sink"]["count"] > 0
    tests = [
        ("removed", "dense", 0, model["trained_length"], 1, own["streaming", 1, 63] - 0.02, 1.84, 0.0031),
        ("replaced", "streaming", kept, 64 - kept, kept, own["streaming", kept, 64 - kept], 1.31, 0.0007),
    ]
    rows = []
    for test, policy, sinks, window, num_tokens, loss, of_sink, of_vanilla in tests:
        delta = of_sink if is_sink else of_vanilla
        half = 0.04 if is_sink else 0.0019
        rows.append(
            {
                "model": model["name"],
                "text": text,
                "test": test,
                "policy": policy,
                "sinks": sinks,
                "window": window,
                "num_tokens": num_tokens,
                "tokens_scored": TOKENS_SCORED,
                "loss_nats": loss,
                "changed_loss_nats": loss + delta,
                "delta_nats": delta,
                "ci95": [delta - half, delta + half],
                "p": math.erfc(delta / (half / 1.96) / math.sqrt(2)),
                "interval": "text",
            }
        )
    return rows


def _quantized(model: Row, text: str, perplexity: list[Row]) -> list[Row]:
    """Static scales suffer where the sink's slot is in the statistics; 4 bits cost more than 8."""
    slots = model["sink"]["count"] or 4
    [streaming] = [
        row["loss_nats"]
        for row in perplexity
        if (row["model"], row["text"], row["policy"]) == (model["name"], text, "streaming")
        and (row["sinks"], row["window"]) == (slots, 64 - slots)
    ]
    rows, of_kind = [], (0.6 if model["sink"]["count"] else 1.0) * (0.9 + 0.1 * model["seed"])
    for scheme, cost in (("w8a8-static", 0.0093), ("w8a8-token", 0.0021), ("kv8", 0.0004), ("kv4", 0.0312)):
        for in_statistics in (True, False) if scheme == "w8a8-static" else (None,):
            for is_kept in (False, True):
                own = of_kind * cost * (24.0 if in_statistics else 1.0) * (0.8 if is_kept else 1.0)
                for policy, sinks, window, loss in (
                    ("streaming", slots, 64 - slots, streaming),
                    ("dense", 0, 128, streaming - 0.04),
                ):
                    delta = own * (1.1 if policy == "dense" else 1.0)
                    half = 0.0007 + 0.05 * delta
                    rows.append(
                        {
                            "model": model["name"],
                            "text": text,
                            "policy": policy,
                            "sinks": sinks,
                            "window": window,
                            "scheme": scheme,
                            "num_sink_slots": slots,
                            "sink_in_full_precision": is_kept,
                            "sink_in_statistics": in_statistics,
                            "calibration_tokens": None if in_statistics is None else 2_500,
                            "tokens_scored": TOKENS_SCORED,
                            "loss_nats": loss,
                            "quantized_loss_nats": loss + delta,
                            "delta_nats": delta,
                            "ci95": [delta - half, delta + half],
                            "p": math.erfc(delta / (half / 1.96) / math.sqrt(2)),
                            "interval": "text",
                            "dtype": "float32",
                        }
                    )
    return rows


# -- sinks inside the network -----------------------------------------------------------------------


def _sink_metrics(model: Row, draw: random.Random) -> list[Row]:
    is_sink = model["sink"]["count"] > 0
    has_null = model["arm"] == "zero"
    trained = [0.47, 0.021, 0.0, 0.0] if is_sink else [0.09, 0.004, 0.0, 0.0]
    return [
        {
            "model": model["name"],
            "weights": weights,
            "eps": 0.3,
            "seq_len": 64,
            "num_sequences": 100,
            "position": position,
            "is_sink": is_sink and position == 0,
            "value": min(1.0, value * (0.95 + 0.1 * draw.random())),
        }
        for weights, values in (("trained", [0.38] * has_null + trained), ("initial", [0.0] * (4 + has_null)))
        for position, value in enumerate(values, -has_null)
    ]


def _attention(model: Row, draw: random.Random) -> list[Row]:
    own = model["sink"]["count"]
    rows = []
    for weights in ("trained", "initial"):
        for layer in range(NUM_LAYERS):
            for head in range(NUM_HEADS):
                grown = (0.62 if own else 0.17) * (0.3 + 0.7 * layer) * (weights == "trained")
                first = 0.06 + grown * (0.8 + 0.4 * draw.random())
                mass = [first, *(0.05 * 0.9**position for position in range(1, 8))]
                rows.append(
                    {
                        "model": model["name"],
                        "weights": weights,
                        "layer": layer,
                        "head": head,
                        "seq_len": 128,
                        "num_sequences": 16,
                        "mass": mass,
                        "sink_mass": first if own else None,
                        "null_mass": NULL_MASS.get(model["arm"], {}).get(weights, 0.0),
                        "null_mass_is_proxy": model["arm"] == "gate",
                        "top_positions": [0, 1, 2, 3, 19],
                        "top_mass": [*mass[:4], 0.031],
                        "value_norm_ratio": 1.0 - 0.9 * grown,
                    }
                )
    return rows


def _norms(model: Row, draw: random.Random) -> list[Row]:
    own = model["sink"]["count"]
    return [
        {
            "model": model["name"],
            "weights": weights,
            "layer": layer,
            "seq_len": 128,
            "num_sequences": 16,
            "hidden_norm_ratio": 1.0 + growth * (7.5 if own else 1.1),
            "kurtosis": 3.0 + growth * (96.0 if own else 11.0) + 0.1 * draw.random(),
            "kurtosis_without_first": 3.0 + growth * 1.7,
            "max_abs": 4.1 + growth * (58.0 if own else 6.0),
            "max_abs_without_first": 4.0 + growth * 2.2,
            "top1_over_median": 6.1 + growth * (88.0 if own else 9.0) * (0.8 + 0.2 * model["seed"]),
            "top1_over_median_without_first": 6.0 + growth * (2.0 + model["seed"]),
        }
        for weights in ("trained", "initial")
        for layer in range(NUM_LAYERS + 1)
        for growth in [layer * (weights == "trained")]
    ]


# -- what a stream can do, and what it costs --------------------------------------------------------


def _stream_evals(model: Row) -> list[Row]:
    """Right inside the cache, chance outside it; dense keeps more than streaming does."""
    own = model["sink"]["count"] or 4
    settings = [("streaming", own, 64 - own), ("streaming", own, 32 - own), ("dense", 0, STREAM_LEN)]
    rows = []
    for task, chance in (("streameval", 0.01), ("access", 0.25)):
        for policy, sinks, window in settings:
            for distance_lines in (1, 2, 4, 8, 16):
                distance_tokens = 9.5 * distance_lines
                is_kept = distance_tokens < window
                right = round(200 * (0.86 - 0.002 * distance_tokens if is_kept else chance))
                rows.append(
                    {
                        "model": model["name"],
                        "task": task,
                        "policy": policy,
                        "sinks": sinks,
                        "window": window,
                        "distance_lines": distance_lines,
                        "distance_tokens": distance_tokens,
                        "num_queries": 200,
                        "accuracy": right / 200,
                        "ci95": _wilson(right, 200),
                        "chance": chance,
                    }
                )
    return rows


def _wilson(right: int, total: int, z: float = 1.959964) -> list[float]:
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _latencies(model: Row, draw: random.Random) -> list[Row]:
    """Streaming and recompute stay flat; dense grows with the stream."""
    own = model["sink"]["count"]
    kept = own or 4
    bytes_per_key = 2 * NUM_LAYERS * 128 * 4
    rows = []
    for stream_pos in (256, 1024, 4096, 16384):
        settings = [
            ("streaming", kept, 64 - kept, 0.61, 64),
            ("streaming", kept, 32 - kept, 0.58, 32),
            ("dense", 0, stream_pos, 0.55 + stream_pos / 2900, stream_pos),
            ("recompute", own, 64 - own, 3.9, 0),
        ]
        for policy, sinks, window, ms, keys in settings:
            p50 = ms * (0.98 + 0.04 * draw.random())
            rows.append(
                {
                    "model": model["name"],
                    "policy": policy,
                    "sinks": sinks,
                    "window": window,
                    "batch": 1,
                    "stream_pos": stream_pos,
                    "ms_per_token_p50": p50,
                    "ms_per_token_p95": p50 * 1.18,
                    "peak_mem_bytes": 9_400_000 + keys * bytes_per_key,
                    "cache_bytes": keys * bytes_per_key if policy != "recompute" else None,
                    "device": "cpu (x86_64)",
                }
            )
    return rows


def _zero_shot(model: Row) -> Row:
    value = 0.412 if model["arm"] == "vanilla" else 0.431
    return {
        "model": model["name"],
        "task": "arc_easy",
        "metric": "acc",
        "value": value,
        "stderr": math.sqrt(value * (1 - value) / 2375),
        "num_examples": 2376,
        "num_fewshot": 0,
        "higher_is_better": True,
    }


def _zero_shot_pair(b: Row, a: Row) -> Row:
    delta = _zero_shot(a)["value"] - _zero_shot(b)["value"]
    return {
        "a": a["name"],
        "b": b["name"],
        "task": "arc_easy",
        "metric": "acc",
        "delta": delta,
        "ci95": [delta - 0.012, delta + 0.012],
        "p": 0.002 if delta else 1.0,
        "num_examples": 2376,
        "interval": "examples",
    }


def _verified(model: Row, text: str, draw: random.Random) -> list[Row]:
    return [
        {
            "model": model["name"],
            "text": text,
            "sinks": sinks,
            "window": length - sinks,
            "num_tokens": 256,
            "max_logit_diff": 2e-6 * (1 + draw.random()),
            "dtype": "float32",
        }
        for length in LENGTHS
        for sinks in SINKS
    ]
