"""Choosing the next token from logits, as transformers' ``generate`` does.

Axes: batch, vocab. Nothing here waits for a CUDA device, and all shapes are constant there: a captured
graph may hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.errors import StreamError

COLDEST, HOTTEST = 1e-30, 1e30
"""Beyond these a draw is the most probable token, or an even one, all the same, and float32 overflows."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The cuts follow each other in this order; None leaves one out.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: keep the k most probable tokens.
        top_p: keep the smallest set of most probable tokens that holds this much probability.
        min_p: keep the tokens with at least this share of the most probable one's probability.
        repetition_penalty: above 1 makes tokens that the cache still holds less probable, below 1 more.

    Raises:
        StreamError: nothing can be drawn with a setting.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise StreamError(f"temperature is {self.temperature}; use 0 (most probable token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise StreamError(f"top_k is {self.top_k}; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise StreamError(f"top_p is {self.top_p}; use a probability above 0, at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise StreamError(f"min_p is {self.min_p}; use a share from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise StreamError(f"repetition_penalty is {self.repetition_penalty}; use more than 0 (1 is none)")


def sample(
    logits: Tensor,
    sampling: Sampling,
    *,
    suppress: Tensor | None = None,
    recent: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: float[batch, vocab].
        suppress: bool[vocab], ids that are never drawn; at least one must be left.
        recent: int64[batch, slots], tokens that the repetition penalty counts; -1 where a slot is empty.
        generator: on the device of ``logits``.

    Returns:
        int64[batch].
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if recent is not None and sampling.repetition_penalty != 1:
        scores = _penalise(scores, recent, sampling.repetition_penalty)
    if suppress is not None:
        scores = scores.masked_fill(suppress, -torch.inf)
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    temperature = min(max(sampling.temperature, COLDEST), HOTTEST)
    if sampling.top_k is not None:
        kth = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    ids = None
    if sampling.top_p is not None and sampling.top_p < 1:
        scores, ids = _nucleus(scores, temperature, sampling.top_p)
    if sampling.min_p:
        least = scores.amax(dim=-1, keepdim=True) + temperature * math.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    drawn = (_race if scores.is_cuda else _invert)(scores, temperature, generator)
    return drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]


def _penalise(scores: Tensor, recent: Tensor, penalty: float) -> Tensor:
    padded = F.pad(scores, (0, 1))  # the last column takes what empty slots write
    slots = recent.remainder(padded.shape[-1])
    held = padded.gather(-1, slots)
    return padded.scatter_(-1, slots, torch.where(held < 0, held * penalty, held / penalty))[:, :-1]


def _nucleus(scores: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Scores by falling probability, those outside the nucleus -inf, and the ids that they belong to."""
    ranked, ids = _rank((scores / temperature).softmax(dim=-1), top_p)
    before = ranked.cumsum(dim=-1, dtype=torch.float64) - ranked
    return scores.gather(-1, ids).masked_fill(before >= top_p, -torch.inf), ids


def _rank(probabilities: Tensor, enough: float) -> tuple[Tensor, Tensor]:
    """Most probable first, and their ids; on a CPU often only as many as hold ``enough`` together.

    There a whole sort of 50,304 takes 6 ms, as long as a step of a 14m model.
    """
    for most in () if probabilities.is_cuda else (256, 4096):
        ranked, ids = probabilities.topk(min(most, probabilities.shape[-1]), dim=-1)
        if bool((ranked.sum(dim=-1) >= enough).all()):
            return ranked, ids
    ranked, ids = probabilities.sort(dim=-1, descending=True)
    return ranked, ids


def _race(scores: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The first to arrive, each token after an exponential time with its probability as the rate.

    In float32 the shortest time on CUDA is 2**-24, which would deny rare tokens their share.
    """
    times = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    times.exponential_(generator=generator)
    return torch.sub(scores, times.log_(), alpha=temperature).argmax(dim=-1)


def _invert(scores: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Where one uniform number falls among the summed probabilities: on a CPU noise is dear, sums cheap."""
    sums = (scores / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.rand((len(sums), 1), dtype=torch.float64, device=sums.device, generator=generator)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]
