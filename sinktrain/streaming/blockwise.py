"""Exact streaming evaluation in blocks: the logits of token-by-token decoding at training-like speed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sinktrain.errors import StreamError
from sinktrain.model.loss import token_losses
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.band import march
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.step import has_kernels

MAX_LOGITS = 2**25
"""Logits held at once."""


@torch.no_grad()
def stream_logits(
    model: GPTNeoX,
    tokens: Tensor,
    sinks: int,
    window: int,
    block_size: int | None = None,
    require_sink: bool = True,
) -> Iterator[Tensor]:
    """Logits of every token of a stream under a layout, as decoding token by token gives them.

    Args:
        tokens: int64[batch, seq], as they stand: a ``token`` model's own sinks come first.
        sinks, window: the layout.
        block_size: tokens fed at once; chosen by memory when None.
        require_sink: refuse a ``token`` model's stream that does not start with its sink.

    Yields:
        float[batch, block, vocab], in order; a block is cut where its logits would be too many.

    Raises:
        StreamError: no tokens, layout or block empty, or the sink missing.
    """
    for hidden in _stream_hidden(model, tokens, Layout(sinks, window), block_size, require_sink):
        for part in torch.split(hidden, _chunk(model, len(hidden)), dim=1):
            yield model.logits(part)


@torch.no_grad()
def stream_loss(
    model: GPTNeoX,
    tokens: Tensor,
    sinks: int,
    window: int,
    block_size: int | None = None,
    require_sink: bool = True,
) -> Tensor:
    """Loss of each next token of a stream, in nats; arguments and errors as ``stream_logits``.

    Returns:
        float32 (float64 for float64 models)[batch, seq - 1]; entry i scores token i + 1, NaN where
        that is a sink, which is never predicted.
    """
    tokens = tokens.to(model.device)
    losses: list[Tensor] = []
    done = 0
    for hidden in _stream_hidden(model, tokens, Layout(sinks, window), block_size, require_sink):
        targets = tokens[:, done + 1 : done + 1 + hidden.shape[1]]
        losses.append(_losses(model, hidden[:, : targets.shape[1]], targets))
        done += hidden.shape[1]
    result = torch.cat(losses, dim=1)
    sink_ids = torch.tensor(model.sink_ids, dtype=tokens.dtype, device=tokens.device)
    return result.masked_fill(torch.isin(tokens[:, 1:], sink_ids), torch.nan)


def check_starts_with_sink(model: GPTNeoX, tokens: Tensor, ages: Tensor) -> None:
    """Raise StreamError if a token at the place of one of the model's sinks is another token.

    Args:
        tokens: int64[batch, seq].
        ages: int64[batch], tokens that came before in each stream.
    """
    count = len(model.sink_ids)
    age = (ages[:, None] + torch.arange(tokens.shape[1], device=ages.device)).clamp(max=count)
    expected = torch.tensor([*model.sink_ids, -1], device=tokens.device)[age]
    if bool(((age < count) & (tokens != expected)).any()):
        raise StreamError(
            f"the stream does not start with the model's sink {model.sink_ids}; put model.sink_ids in front, "
            "or pass require_sink=False to see what happens without"
        )


def _stream_hidden(
    model: GPTNeoX, tokens: Tensor, layout: Layout, block_size: int | None, require_sink: bool
) -> Iterator[Tensor]:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise StreamError(f"a stream takes tokens of shape [1 or more, 1 or more], not {list(tokens.shape)}")
    if block_size is not None and block_size < 1:
        raise StreamError(f"block_size is {block_size}; use 1 or more, or None")
    tokens = tokens.to(model.device)
    if require_sink:
        check_starts_with_sink(model, tokens, tokens.new_zeros(len(tokens)))
    yield from march(model, tokens, layout, block_size)


def _losses(model: GPTNeoX, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target, float[batch, block], from states before the head: float[batch, block, hidden]."""
    if has_kernels(model):
        from sinktrain.streaming.band_fused import fused_losses

        return fused_losses(model, hidden.flatten(0, 1), targets.flatten()).view(targets.shape)
    return torch.cat(list(_chunked_losses(model, hidden, targets)), dim=1)


def _chunked_losses(model: GPTNeoX, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
    chunk = _chunk(model, len(hidden))
    parts = zip(torch.split(hidden, chunk, dim=1), torch.split(targets, chunk, dim=1), strict=True)
    for part, part_targets in parts:
        yield token_losses(model.logits(part), part_targets)


def _chunk(model: GPTNeoX, batch_size: int) -> int:
    """Tokens of each row whose logits are held at once."""
    return max(1, MAX_LOGITS // (batch_size * model.config.vocab_size))
