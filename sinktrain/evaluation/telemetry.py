"""What sinks do inside a network, layer by layer and head by head: rows of ``results.json``.

Every figure is taken twice: of the model as given ("trained") and of the same network as training would
start it ("initial"), which is the null: what is alike in both was not learned.

Axes: text, batch, layer, head, seq, hidden. Positions count a model's own sinks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinktrain.errors import ModelError
from sinktrain.evaluation.pieces import cut_pieces
from sinktrain.evaluation.sink_metric import (
    NUM_POSITIONS,
    Observed,
    hearing,
    observe_texts,
    sink_metric,
)
from sinktrain.model.checkpoints import empty_model
from sinktrain.model.init import initialize
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import angle_dtype

Row = dict[str, Any]

NULL_POSITION = -1
"""The null slot's in rows of ``sink_metric``: it lies right in front of the first token."""

METRIC_EPS = 0.3
METRIC_SEQ_LEN = 64
METRIC_SEQUENCES = 100
"""The sink metric's published setting."""

NUM_SEQUENCES = 16
"""Sequences of the trained length that all else is averaged over."""

NUM_TOP = 5


@dataclass(frozen=True)
class Telemetry:
    """Rows of the lists of the same name in ``results.json``, without their model.

    Args:
        sink_metric: by position, as ``sink_metric`` gives it; the null slot's first, if there is one.
        sink_attention: by layer and head; see ``_attention_rows``.
        norms: by layer, from the embedding (0) to what the last norm reads; see ``_hidden_statistics``.
    """

    sink_metric: list[Row]
    sink_attention: list[Row]
    norms: list[Row]


def telemetry(
    model: GPTNeoX, texts: NDArray[np.int64], trained_length: int, initial_seed: int = 0
) -> Telemetry:
    """Look into a model that reads plain text with its own sinks in front.

    The sink metric is taken at 64 tokens over 100 sequences, all else at the trained length over 16;
    shorter or fewer where the texts hold less, and every row says which.

    Args:
        texts: int64[text, token], for example the streams of the perplexity table; pieces are cut from them.
        trained_length: positions that the model was trained on.
        initial_seed: of the fresh network; a run's own seed gives the values that it started with.

    Raises:
        DataError: the texts are shorter than 8 tokens besides the model's sinks.
        ModelError: the network gives values that are not finite.
    """
    trained = _look_into(model, "trained", texts, trained_length)
    initial = _look_into(initial_model(model, initial_seed), "initial", texts, trained_length)
    return Telemetry(
        trained.sink_metric + initial.sink_metric,
        trained.sink_attention + initial.sink_attention,
        trained.norms + initial.norms,
    )


def initial_model(model: GPTNeoX, seed: int = 0) -> GPTNeoX:
    """The same network with the weights that training would start from, on the same device and dtype."""
    fresh = empty_model(model.config)
    weights = {name: torch.empty_like(weight) for name, weight in model.state_dict().items()}
    fresh.load_state_dict(weights, assign=True)
    initialize(fresh, seed)
    return fresh.to(model.device).eval().requires_grad_(False)


def _look_into(model: GPTNeoX, weights: str, texts: NDArray[np.int64], trained_length: int) -> Telemetry:
    longest = min(trained_length, texts.shape[1])
    for_metric = cut_pieces(texts, min(METRIC_SEQ_LEN, longest), METRIC_SEQUENCES)
    pieces = cut_pieces(texts, longest, NUM_SEQUENCES)
    attention, hidden = _AttentionSums(model, longest), _HiddenSums(model)
    with hearing([*model.gpt_neox.layers, model.gpt_neox.final_layer_norm], hidden):
        observe_texts(model, pieces, longest, attention)
    facts = {"weights": weights, "seq_len": longest, "num_sequences": len(pieces)}
    found = Telemetry(
        _metric_rows(model, weights, for_metric),
        [facts | row for row in _attention_rows(model, attention, len(pieces))],
        [facts | row for row in _norm_rows(hidden, len(pieces))],
    )
    _check_finite(found)
    return found


def _metric_rows(model: GPTNeoX, weights: str, pieces: NDArray[np.int64]) -> list[Row]:
    num_sequences, seq_len = pieces.shape
    metric = sink_metric(model, pieces, seq_len, METRIC_EPS)
    values = [] if metric.null is None else [(NULL_POSITION, metric.null)]
    values += enumerate(metric.by_position.tolist())
    return [
        {
            "weights": weights,
            "eps": METRIC_EPS,
            "seq_len": seq_len,
            "num_sequences": num_sequences,
            "position": position,
            "is_sink": 0 <= position < len(model.sink_ids),
            "value": value,
        }
        for position, value in values
    ]


# -- attention ------------------------------------------------------------------------------------


class _AttentionSums:
    """Importance of each position, null mass and how small the first value is, summed over sequences."""

    def __init__(self, model: GPTNeoX, seq_len: int) -> None:
        shape = (model.config.network.num_hidden_layers, model.config.network.num_attention_heads)
        self.importance = torch.zeros(*shape, seq_len, dtype=torch.float64, device=model.device)
        self.null_mass = torch.zeros(*shape, dtype=torch.float64, device=model.device)
        self.is_proxy = False
        self.value_norm_ratio = torch.zeros(*shape, dtype=torch.float64, device=model.device)

    def __call__(self, seen: Observed) -> None:
        self.importance[seen.layer] += seen.importance.sum(dim=0)
        if seen.null_mass is not None:
            self.null_mass[seen.layer] += seen.null_mass.sum(dim=0)
            self.is_proxy = seen.is_proxy
        norms = seen.values.to(angle_dtype(seen.values.dtype)).norm(dim=-1)
        self.value_norm_ratio[seen.layer] += (norms[..., 0] / norms.mean(dim=-1)).sum(dim=0)


def _attention_rows(model: GPTNeoX, sums: _AttentionSums, num_sequences: int) -> Iterator[Row]:
    """What each head does with the first positions, with its own sinks and with any others.

    ``mass`` is the importance of the first 8 positions, a mean over the rows that can see each, averaged
    over sequences; ``sink_mass`` its sum over own sinks (with more than one it can exceed 1 by 1 / seq_len,
    because the first rows see only some of them). The top positions are chosen among those that half of
    the rows can see: later ones are seen by their neighbours alone. ``value_norm_ratio`` is
    ||v_0|| / mean_j ||v_j|| (Guo et al., arXiv 2410.13835). ``null_mass`` is the mean over rows of what the
    weights on tokens leave to the null slot, 0 without one. A kind that scales what heads put out has the
    weights of softmax; 1 - its mean scale stands there as a proxy, and ``null_mass_is_proxy`` says so.
    """
    importance = (sums.importance / num_sequences).cpu().numpy()
    null_mass = (sums.null_mass / num_sequences).cpu().numpy()
    ratios = (sums.value_norm_ratio / num_sequences).cpu().numpy()
    num_sinks = len(model.sink_ids)
    num_eligible = importance.shape[-1] // 2 + 1
    for layer, head in np.ndindex(*ratios.shape):
        received = importance[layer, head]
        top = np.argsort(-received[:num_eligible], kind="stable")[:NUM_TOP]
        yield {
            "layer": layer,
            "head": head,
            "mass": received[:NUM_POSITIONS].tolist(),
            "sink_mass": float(received[:num_sinks].sum()) if num_sinks else None,
            "null_mass": float(null_mass[layer, head]),
            "null_mass_is_proxy": sums.is_proxy,
            "top_positions": top.tolist(),
            "top_mass": received[top].tolist(),
            "value_norm_ratio": float(ratios[layer, head]),
        }


# -- hidden states --------------------------------------------------------------------------------


class _HiddenSums:
    """Statistics of each layer's hidden states, summed over sequences: ``by_layer[layer][name]``."""

    def __init__(self, model: GPTNeoX) -> None:
        self.num_first = max(1, len(model.sink_ids))
        self.by_layer: list[dict[str, Tensor]] = [
            {} for _ in range(model.config.network.num_hidden_layers + 1)
        ]

    def __call__(self, layer: int, states: Tensor) -> None:
        sums = self.by_layer[layer]
        for name, values in _hidden_statistics(states.to(angle_dtype(states.dtype)), self.num_first).items():
            total = values.sum(dtype=torch.float64)
            sums[name] = sums[name] + total if name in sums else total


def _hidden_statistics(states: Tensor, num_first: int) -> dict[str, Tensor]:
    """How large the first position is and how heavy the tails are, sequence by sequence.

    ``hidden_norm_ratio`` is ||h_0|| / mean_{t>0} ||h_t||. The others are over all entries of a sequence
    at once, as Bondarenko et al. take them (arXiv 2306.12929 and their ``validate_clm.py``): kurtosis
    (fourth moment over squared variance: 3 for a normal distribution) and largest magnitude. The largest
    over the median magnitude is Sun et al.'s (arXiv 2402.17762). Each is told with and without the first
    positions, which hold the own sinks, or token 0 of a model without.

    Args:
        states: float[batch, seq, hidden].
        num_first: positions that "without first" leaves out.

    Returns:
        float[batch] each.
    """
    norms = states.norm(dim=-1)
    statistics = {"hidden_norm_ratio": norms[:, 0] / norms[:, 1:].mean(dim=1)}
    for suffix, kept in (("", states), ("_without_first", states[:, num_first:])):
        entries = kept.flatten(1)
        magnitudes = entries.abs()
        largest = magnitudes.amax(dim=1)
        statistics |= {
            "kurtosis" + suffix: _kurtosis(entries),
            "max_abs" + suffix: largest,
            "top1_over_median" + suffix: largest / magnitudes.median(dim=1).values,
        }
    return statistics


def _kurtosis(entries: Tensor) -> Tensor:
    """Of each row: float[batch, entry] -> float[batch]."""
    centred = entries - entries.mean(dim=1, keepdim=True)
    scale = centred.square().mean(dim=1, keepdim=True).sqrt()
    return (centred / scale).pow(4).mean(dim=1)


def _norm_rows(sums: _HiddenSums, num_sequences: int) -> Iterator[Row]:
    for layer, by_name in enumerate(sums.by_layer):
        yield {"layer": layer} | {name: float(total) / num_sequences for name, total in by_name.items()}


def _check_finite(found: Telemetry) -> None:
    for row in found.sink_attention + found.norms:
        figures = [value for value in row.values() if isinstance(value, float)] + row.get("mass", [])
        if not all(map(math.isfinite, figures)):
            raise ModelError(
                f"layer {row['layer']} of the {row['weights']} network gives values that are not finite: its "
                "weights are damaged or its training diverged; use an earlier checkpoint"
            )
