"""Log-probabilities of answers, many windows at once: what lm-evaluation-harness asks of a model.

Axes: window, seq (tokens of a window, sinks included), answer (tokens that are scored, over all windows).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinktrain.errors import ModelError
from sinktrain.model.attention import CausalAttention
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar

BATCH_TOKENS = 16_384
"""Tokens that the network reads at once, padding included."""
LOGITS_AT_ONCE = 1024
"""Answer tokens whose logits are held at once: each has as many as the vocabulary has rows."""


@dataclass(frozen=True)
class Window:
    """Tokens for the model to read, its sinks first, and the answer that its last states are to tell.

    Args:
        fed: the sinks, then context and answer without the answer's last token.
        answer: token by token, the last ``len(answer)`` states of ``fed`` tell it.
    """

    fed: list[int]
    answer: list[int]


def window(model: GPTNeoX, context: Sequence[int], answer: Sequence[int], max_length: int) -> Window:
    """The sinks, as much of the context's end as fits, and the answer.

    Args:
        context: tokens of text; may be empty where the model has sink tokens.

    Raises:
        ModelError: the answer alone is too long.
    """
    sinks = model.sink_ids
    room = max_length - len(sinks)  # for tokens of text that are read
    most = room + bool(sinks)  # the first token of an answer follows a sink, or else one of the context
    if not 0 < len(answer) <= most:
        raise ModelError(f"an answer of {len(answer)} tokens; this model can score 1 to {most} of them")
    text = [*context, *answer][-(room + 1) : -1]
    return Window([*sinks, *text], list(answer))


@torch.no_grad()
def score(
    model: GPTNeoX, windows: Sequence[Window], batch_tokens: int = BATCH_TOKENS
) -> list[tuple[float, bool]]:
    """Summed log-probability of each window's answer, and whether greedy decoding would give it.

    Windows of like length are read together, the shorter ones padded behind their ends, where no token of
    theirs looks. Log-probabilities are over the whole vocabulary, in float32 or better.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(windows)
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number].fed))
    with progress_bar(total=len(windows), desc="scored", unit="answer") as bar:
        for numbers in _batches(order, windows, batch_tokens):
            for number, result in zip(numbers, _scored(model, [windows[n] for n in numbers]), strict=True):
                found[number] = result
            bar.update(len(numbers))
    return found


def _batches(order: Sequence[int], windows: Sequence[Window], batch_tokens: int) -> Iterator[list[int]]:
    """Windows in their order, longest first, cut into batches of so many tokens."""
    begin = 0
    while begin < len(order):
        size = max(1, batch_tokens // len(windows[order[begin]].fed))
        yield list(order[begin : begin + size])
        begin += size


def _scored(model: GPTNeoX, windows: Sequence[Window]) -> list[tuple[float, bool]]:
    """``score`` of one batch, the longest window first."""
    tokens = torch.zeros((len(windows), len(windows[0].fed)), dtype=torch.int64)
    for row, one in zip(tokens, windows, strict=True):
        row[: len(one.fed)] = torch.tensor(one.fed)
    attend = CausalAttention(model.rotary_steps, tokens.shape[1], model.dtype)
    hidden = model.hidden(tokens.to(model.device), attend)
    lengths = torch.tensor([len(one.answer) for one in windows])
    rows = torch.arange(len(windows)).repeat_interleave(lengths)
    ends = [range(len(one.fed) - len(one.answer), len(one.fed)) for one in windows]
    places = torch.tensor([place for end in ends for place in end])
    answers = torch.tensor([token for one in windows for token in one.answer])
    log_probs, is_greedy = _told(model, hidden[rows, places], answers.to(model.device))
    sums = torch.zeros(len(windows), dtype=torch.float64).index_add_(0, rows, log_probs.cpu().double())
    missed = torch.zeros(len(windows), dtype=torch.int64).index_add_(0, rows, (~is_greedy).cpu().long())
    return list(zip(sums.tolist(), (missed == 0).tolist(), strict=True))


def _told(model: GPTNeoX, hidden: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """float[answer, hidden], int64[answer] -> log-probability of each, and whether it is the likeliest."""
    told, is_greedy = [], []
    pieces = zip(torch.split(hidden, LOGITS_AT_ONCE), torch.split(answers, LOGITS_AT_ONCE), strict=True)
    for states, targets in pieces:
        logits = model.logits(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        told.append(logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0])
        logits[:, model.sink_ids] = -torch.inf  # a sink is never an answer
        is_greedy.append(logits.argmax(dim=-1) == targets)
    return torch.cat(told), torch.cat(is_greedy)
