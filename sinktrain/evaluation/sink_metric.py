"""Attention whose weights can be seen, and the published sink metric, which is read from them.

Axes: text, batch (texts that go through the network at once), head, seq, head_dim. Positions count a
model's own sinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinktrain.errors import DataError
from sinktrain.evaluation.pieces import with_sinks
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles

NUM_POSITIONS = 8
"""First positions that are told one by one."""

MAX_TOKENS = 2**13
"""Tokens that go through the network at once."""

MAX_WEIGHTS = 2**25
"""Attention weights held at once: 128 MiB in float32."""

Observe = Callable[[int, Tensor, Tensor], None]
"""What is told of a layer: its index, importance float64[batch, head, seq], values as in ``Attend``."""


class ObservedAttention:
    """``CausalAttention`` that computes its weights, in float32 at least, and tells what positions receive.

    The importance of a position is the mean weight on it, over the rows that can see it.
    """

    def __init__(self, rotary_steps: Tensor, seq_len: int, dtype: torch.dtype, observe: Observe) -> None:
        rotary_pos = torch.arange(seq_len, device=rotary_steps.device)
        self.cos, self.sin = rotary_angles(rotary_pos, rotary_steps, angle_dtype(dtype))
        self.num_seeing = seq_len - rotary_pos
        self.observe = observe

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (apply_rotary(x, self.cos, self.sin).to(self.cos.dtype) for x in (q, k))
        batch, num_heads, seq_len, _ = q.shape
        received = torch.zeros(batch, num_heads, seq_len, dtype=torch.float64, device=q.device)
        num_rows = max(1, MAX_WEIGHTS // received.numel())
        mixed = []
        for start in range(0, seq_len, num_rows):
            stop = min(start + num_rows, seq_len)
            weights = _causal_weights(q[:, :, start:stop], k[:, :, :stop])
            received[..., :stop] += weights.sum(dim=-2, dtype=torch.float64)
            mixed.append(weights @ v[:, :, :stop].to(weights.dtype))
        self.observe(layer, received / self.num_seeing, v)
        return torch.cat(mixed, dim=2).to(v.dtype)


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
    for batch in torch.split(tokens, max(1, MAX_TOKENS // seq_len)):
        model.hidden(batch.to(model.device), attend)


def sink_metric(
    model: GPTNeoX, texts: NDArray[np.int64], seq_len: int = 64, eps: float = 0.3
) -> NDArray[np.float64]:
    """Share of heads for which a position is a sink, for each of the first 8 positions.

    A position is a sink for a head in a sequence if its importance there is above ``eps``; the share is
    over all sequences, layers and heads. It falls with ``seq_len``, so compare at the same.

    Args:
        texts: int64[text, token], plain text; the model's own sinks are put in front.
        seq_len: length of the sequences, own sinks counted.
        eps: importance that makes a sink.

    Returns:
        float64[8], 0 to 1.

    Raises:
        DataError: the texts do not fill one sequence of ``seq_len``.

    Source: Gu et al. (arXiv 2410.10781) section 3.2, as ``eval_sink_pretrain.py`` of sail-sg/Attention-Sink
    computes it.
    """
    num_above = torch.zeros(NUM_POSITIONS, dtype=torch.int64, device=model.device)

    def count(layer: int, importance: Tensor, values: Tensor) -> None:
        num_above.add_((importance[..., :NUM_POSITIONS] > eps).sum(dim=(0, 1)))

    observe_texts(model, texts, seq_len, count)
    network = model.config.network
    num_asked = len(texts) * network.num_hidden_layers * network.num_attention_heads
    return num_above.cpu().numpy() / num_asked


def _causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of the newest queries over all keys so far: float[batch, head, query, key]."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    is_later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    is_later = is_later.triu(1 + num_keys - num_queries)
    return scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
