"""Choosing the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sinktrain.errors import StreamError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise StreamError where ``sample`` could not draw with these settings."""
    if not 0 <= temperature < math.inf:
        raise StreamError(f"temperature is {temperature}; use 0 (most probable token) or more")
    if top_k is not None and top_k < 1:
        raise StreamError(f"top_k is {top_k}; use 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise StreamError(f"top_p is {top_p}; use a probability above 0, at most 1")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row, as transformers' ``generate`` does, with settings that ``check_sampling`` passes.

    Args:
        logits: float[batch, vocab].
        temperature: 0 takes the most probable token.
        top_k: keep the k most probable tokens.
        top_p: keep the smallest set of most probable tokens that holds this much probability.
        suppress: ids that are never drawn.
        generator: on the device of ``logits``.

    Returns:
        int64[batch].
    """
    logits = logits.float()
    if suppress:
        logits = logits.index_fill(-1, torch.tensor(list(suppress), device=logits.device), -torch.inf)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        logits = _keep_top_p(logits, top_p)
    probabilities = logits.softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, kept)
