"""Attention whose weights can be seen, and the published sink metric, which is read from them.

Axes: text, batch (texts that go through the network at once), head, seq, head_dim. Positions count a
model's own sinks; a null slot is no position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sinktrain.errors import DataError
from sinktrain.evaluation.pieces import with_sinks
from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.model.sinks.base import NullSlot

NUM_POSITIONS = 8
"""First positions that are told one by one."""

MAX_TOKENS = 2**13
"""Tokens that go through the network at once."""

MAX_WEIGHTS = 2**25
"""Attention weights held at once: 128 MiB in float32."""


class Observed(NamedTuple):
    """What the attention of one layer does with a batch of texts.

    Attributes:
        layer: its index.
        importance: float64[batch, head, seq], the mean weight on a position over the rows that can see it.
        values: as in ``Attend``.
        null_mass: float64[batch, head], the mean weight on the null slot, which every row sees: what no
            token gets. Where there is no such slot but outputs are scaled, 1 - the mean scale. Else None.
        is_proxy: whether ``null_mass`` is the latter, and the weights themselves leave nothing.
    """

    layer: int
    importance: Tensor
    values: Tensor
    null_mass: Tensor | None
    is_proxy: bool


Observe = Callable[[Observed], None]


class SinkMetric(NamedTuple):
    """Shares of heads, 0 to 1.

    Attributes:
        by_position: float64[8], of the first positions.
        null: of the null slot, if the model has one.
    """

    by_position: NDArray[np.float64]
    null: float | None


class ObservedAttention:
    """``CausalAttention`` that computes its weights, in float32 at least, and tells where they go.

    Attributes:
        scale: float[batch, seq, head], what the outputs of the layer whose turn it is are multiplied by
            outside of here, or None. Whoever wants it told sets it, as ``observe_texts`` does.
    """

    def __init__(self, rotary_steps: Tensor, seq_len: int, dtype: torch.dtype, observe: Observe) -> None:
        rotary_pos = torch.arange(seq_len, device=rotary_steps.device)
        self.rotary_steps = rotary_steps
        self.cos, self.sin = rotary_angles(rotary_pos, rotary_steps, angle_dtype(dtype))
        self.num_seeing = seq_len - rotary_pos
        self.observe = observe
        self.scale: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        dtype, num_null = self.cos.dtype, 0 if null is None else 1
        q, k = (apply_rotary(x, self.cos, self.sin).to(dtype) for x in (q, k))
        values, null_score = v.to(dtype), None
        if null is not None:
            null = null.in_front(self.rotary_steps)
            k, values = _behind(null.key, k), _behind(null.value, values)
            null_score = null.score
        batch, num_heads, seq_len, _ = q.shape
        received = torch.zeros(batch, num_heads, num_null + seq_len, dtype=torch.float64, device=q.device)
        num_rows = max(1, MAX_WEIGHTS // received.numel())
        mixed = []
        for start in range(0, seq_len, num_rows):
            stop = min(start + num_rows, seq_len)
            num_keys = num_null + stop
            weights = _causal_weights(q[:, :, start:stop], k[:, :, :num_keys], null_score)
            received[..., :num_keys] += weights.sum(dim=-2, dtype=torch.float64)
            mixed.append(weights @ values[:, :, :num_keys])
        importance = received[..., num_null:] / self.num_seeing
        null_mass = self._by_scale() if null is None else received[..., 0] / seq_len
        is_proxy = null is None and null_mass is not None
        self.observe(Observed(layer, importance, v, null_mass, is_proxy))
        return torch.cat(mixed, dim=2).to(v.dtype)

    def _by_scale(self) -> Tensor | None:
        return None if self.scale is None else 1 - self.scale.mean(dim=1, dtype=torch.float64)


@torch.no_grad()
def observe_texts(model: GPTNeoX, texts: NDArray[np.int64], seq_len: int, observe: Observe) -> None:
    """Run texts through the network, the model's own sinks in front, and tell what attention does.

    Nothing of the model changes, nor its mode, on which nothing in the network depends.

    Args:
        texts: int64[text, token], at least ``seq_len`` tokens less the model's own sinks.
        seq_len: length of the sequences, own sinks counted.
        observe: called once for each layer and batch.

    Raises:
        DataError: no texts, shorter ones than that, or fewer than 8 tokens of text in a sequence.
    """
    text_len = seq_len - len(model.sink_ids)
    if text_len < NUM_POSITIONS or not len(texts) or texts.shape[1] < text_len:
        raise DataError(
            f"{len(texts)} texts of {texts.shape[1]} tokens do not fill sequences of {seq_len} with "
            f"{len(model.sink_ids)} sinks in front; give at least 1 text of {max(text_len, NUM_POSITIONS)} "
            f"tokens and sequences of at least {NUM_POSITIONS + len(model.sink_ids)}"
        )
    tokens = with_sinks(model, texts[:, :text_len])
    attend = ObservedAttention(model.rotary_steps, seq_len, model.dtype, observe)
    layers = [cast(Layer, layer) for layer in model.gpt_neox.layers]

    def read_scale(layer: int, x: Tensor) -> None:
        attend.scale = layers[layer].attention.sink.output_scale(x)

    with hearing([layer.attention for layer in layers], read_scale):
        for batch in torch.split(tokens, max(1, MAX_TOKENS // seq_len)):
            model.hidden(batch.to(model.device), attend)


@contextmanager
def hearing(readers: Iterable[nn.Module], hear: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it lasts, tell ``hear(number of the reader, its first input)`` what modules read."""

    def told(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: hear(number, inputs[0])

    handles = [reader.register_forward_pre_hook(told(number)) for number, reader in enumerate(readers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sink_metric(model: GPTNeoX, texts: NDArray[np.int64], seq_len: int = 64, eps: float = 0.3) -> SinkMetric:
    """Share of heads for which a position is a sink: each of the first 8, and the null slot.

    A position is a sink for a head in a sequence if its importance there is above ``eps``; the share is
    over all sequences, layers and heads. It falls with ``seq_len``, so compare at the same. Every row sees
    the null slot, whose importance is its ``null_mass``.

    Args:
        texts: int64[text, token], plain text; the model's own sinks are put in front.
        seq_len: length of the sequences, own sinks counted.
        eps: importance that makes a sink.

    Raises:
        DataError: the texts do not fill one sequence of ``seq_len``.

    Source: Gu et al. (arXiv 2410.10781) section 3.2, as ``eval_sink_pretrain.py`` of sail-sg/Attention-Sink
    computes it, and Table 4 for a slot without a token.
    """
    num_above = torch.zeros(1 + NUM_POSITIONS, dtype=torch.int64, device=model.device)
    has_null = False

    def count(seen: Observed) -> None:
        nonlocal has_null
        num_above[1:].add_((seen.importance[..., :NUM_POSITIONS] > eps).sum(dim=(0, 1)))
        if seen.null_mass is not None and not seen.is_proxy:
            has_null = True
            num_above[0].add_((seen.null_mass > eps).sum())

    observe_texts(model, texts, seq_len, count)
    network = model.config.network
    num_asked = len(texts) * network.num_hidden_layers * network.num_attention_heads
    null, *by_position = (num_above.cpu().numpy() / num_asked).tolist()
    return SinkMetric(np.array(by_position), null if has_null else None)


def _behind(first: Tensor | None, rest: Tensor) -> Tensor:
    """A null slot's key or value, float[head, head_dim] or None for 0, in front of all others."""
    batch, num_heads, _, head_dim = rest.shape
    first = rest.new_zeros(num_heads, head_dim) if first is None else first.to(rest.dtype)
    return torch.cat((first[:, None].expand(batch, -1, -1, -1), rest), dim=2)


def _causal_weights(q: Tensor, k: Tensor, first_score: Tensor | None) -> Tensor:
    """Softmax of the newest queries over all keys so far: float[batch, head, query, key].

    Args:
        first_score: float[head], what the scores of the first key have besides.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if first_score is not None:
        scores[..., 0] += first_score.to(scores.dtype)[:, None]
    is_later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    is_later = is_later.triu(1 + num_keys - num_queries)
    return scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
