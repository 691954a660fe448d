"""What quantisation costs a model, and what the slots of its sinks have to do with it.

One value that is far larger than others makes a scale coarse for all that share it. Such outliers sit in
the sink's slot (arXiv 2402.17762). So each scheme is measured with these slots quantised like all others
and with them in full precision, and static scales besides from statistics with and without them. A model
that was trained with a sink token has its outliers in that one constant slot, if anywhere; the expectation
is that what remains quantises well.

The slots of sinks are those of a model's own sink tokens, otherwise the first four, as it is streamed. A null
slot is no part of the cache; it always stays in full precision.

Text is read twice: *streaming*, in the model's own layout, all streams as the perplexity table reads them;
and *dense*, in windows of the trained length with the model's own sinks in front. The first tokens of each
stream, an eighth at least, calibrate the static scales and are not scored by either. All runs in float32
(or float64), where half precision would add rounding of its own.

Axes: stream, token (of the text, sinks not counted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinktrain.errors import DataError
from sinktrain.evaluation.pieces import cut_pieces, with_sinks
from sinktrain.evaluation.quantizers import Calibration, QuantizedModel, Scheme, calibrate
from sinktrain.evaluation.statistics import paired_difference
from sinktrain.model.devices import dtype_name
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import VANILLA_SINKS, Layout

Row = dict[str, Any]
Losses = Callable[[Tensor, Layout], Tensor]

CALIBRATION_SHARE = 8
"""One token in so many calibrates; more where scoring starts later anyway."""

FIRST_SCORED = 8
"""Of a dense window's text tokens."""

TOKENS_AT_ONCE = 2**13
"""Of dense windows."""


@dataclass(frozen=True)
class Variant:
    """A scheme and what it does with the slots of sinks; ``in_statistics`` is None without calibration."""

    scheme: Scheme
    in_full_precision: bool
    in_statistics: bool | None

    @classmethod
    def of(cls, scheme: Scheme) -> list[Variant]:
        statistics = (True, False) if scheme.kind == "static" else (None,)
        return [cls(scheme, full, some) for some in statistics for full in (False, True)]


@dataclass(frozen=True)
class Reading:
    """Tokens, int64[row, own sinks + token], as a policy reads them; the last of each row are scored."""

    policy: str
    layout: Layout
    tokens: Tensor
    num_scored: int
    rows_at_once: int

    def scored(self, losses: Losses) -> NDArray[np.float64]:
        """Losses in nats: float64[row, num_scored]."""
        parts = [
            losses(some, self.layout)[:, -self.num_scored :]
            for some in torch.split(self.tokens, self.rows_at_once)
        ]
        return torch.cat(parts).double().cpu().numpy()


class Quantization:
    """The study of one model on one text; what all schemes share is measured once, when first needed.

    Args:
        load: the model in float32 or float64.
        streams: int64[stream, token], without sinks, as the perplexity table reads them.
        num_slots: N of the layout that the model is streamed in; the first N tokens are not scored.
    """

    def __init__(self, load: Callable[[], GPTNeoX], streams: NDArray[np.int64], num_slots: int) -> None:
        self._load, self.streams, self.num_slots = load, streams, num_slots
        self.first_scored = max(num_slots, streams.shape[1] // CALIBRATION_SHARE)

    @cached_property
    def model(self) -> GPTNeoX:
        return self._load()

    @property
    def layout(self) -> Layout:
        """The model's own: as many slots for sinks as it has sinks, or four."""
        sinks = len(self.model.sink_ids) or VANILLA_SINKS
        return Layout(sinks, max(1, self.num_slots - sinks))

    def rows(self, scheme: Scheme) -> list[Row]:
        """Rows of ``quantized[]`` in ``results.json``, without model and text.

        Readings with fewer than 16 tokens to score are left out.
        """
        return [row for variant in Variant.of(scheme) for row in self._variant_rows(variant)]

    def _variant_rows(self, variant: Variant) -> Iterator[Row]:
        scheme, largest = variant.scheme, None
        if variant.in_statistics is not None:
            largest = self.calibration.largest(with_sinks=variant.in_statistics)
        model = QuantizedModel(self.model, scheme, self.layout.sinks, variant.in_full_precision, largest)
        for reading, as_it_is in self.full_precision:
            quantized = reading.scored(model.losses)
            try:
                difference = paired_difference(quantized, as_it_is)
            except DataError:  # too few tokens for an interval
                continue
            yield {
                "policy": reading.policy,
                "sinks": reading.layout.sinks,
                "window": reading.layout.window,
                "scheme": scheme.name,
                "num_sink_slots": self.layout.sinks,
                "sink_in_full_precision": variant.in_full_precision,
                "sink_in_statistics": variant.in_statistics,
                "calibration_tokens": None if largest is None else self.streams[:, : self.first_scored].size,
                "tokens_scored": as_it_is.size,
                "loss_nats": float(as_it_is.mean()),
                "quantized_loss_nats": float(quantized.mean()),
                "delta_nats": difference.delta_nats,
                "ci95": [difference.low, difference.high],
                "p": difference.p,
                "interval": "text",
                "dtype": dtype_name(self.model.dtype),
            }

    @cached_property
    def calibration(self) -> Calibration:
        tokens = with_sinks(self.model, self.streams[:, : self.first_scored])
        return calibrate(self.model, tokens, self.layout, self.layout.sinks)

    @cached_property
    def full_precision(self) -> list[tuple[Reading, NDArray[np.float64]]]:
        """Each reading with the losses of the model as it is."""

        def losses(tokens: Tensor, layout: Layout) -> Tensor:
            return stream_loss(self.model, tokens, layout.sinks, layout.window)

        return [(reading, reading.scored(losses)) for reading in self._readings() if reading.num_scored > 0]

    def _readings(self) -> Iterator[Reading]:
        model, scored = self.model, self.streams[:, self.first_scored :]
        yield Reading(
            "streaming", self.layout, with_sinks(model, self.streams), scored.shape[1], len(self.streams)
        )
        num_sinks = len(model.sink_ids)
        length = min(model.config.network.max_position_embeddings - num_sinks, scored.shape[1])
        if length > 0:
            windows = with_sinks(model, cut_pieces(scored, length, scored.size))
            at_once = max(1, TOKENS_AT_ONCE // windows.shape[1])
            yield Reading("dense", Layout(0, windows.shape[1]), windows, length - FIRST_SCORED, at_once)
