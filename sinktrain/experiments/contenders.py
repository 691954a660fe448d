"""What is timed against each other in a cell: ways to decode, each with its cache full already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinktrain.experiments.peers import Peer
from sinktrain.model.devices import dtype_name
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

SEED = 0
MATMULS = "matmuls"
OVERFILL_TOKENS = 16
"""Tokens by which the first prompt is longer than the cache."""


@dataclass(frozen=True)
class Cell:
    """One model, layout and batch size."""

    preset: str
    model: GPTNeoX
    layout: Layout
    batch_size: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def facts(self) -> dict[str, Any]:
        """What all rows of a cell share."""
        return {
            "preset": self.preset,
            "device": self.device.type,
            "dtype": dtype_name(self.model.dtype),
            "sinks": self.layout.sinks,
            "window": self.layout.window,
            "batch": self.batch_size,
        }

    def __str__(self) -> str:
        return f"{self.preset}, {dtype_name(self.model.dtype)}, {self.layout}, batch {self.batch_size}"

    def prompt(self, num_tokens: int) -> Tensor:
        """Random tokens after the model's own sinks: int64[batch, num_tokens]."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch_size, num_tokens)
        tokens = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        sink_ids = torch.tensor(self.model.sink_ids[:num_tokens], dtype=torch.int64)
        tokens[:, : len(sink_ids)] = sink_ids
        return tokens.to(self.device)


@dataclass(frozen=True)
class Contender:
    """A way of decoding, its cache full: each call of ``decode`` adds a token to every row."""

    name: str
    decode: Callable[[], object]
    cache_bytes: int
    decoder: StreamingDecoder | None = None
    note: str = ""

    @property
    def stream_pos(self) -> int | None:
        return None if self.decoder is None else int(self.decoder.stream_pos[0])


def generate_contender(cell: Cell) -> Contender:
    """Our decoder as people call it, sampling included."""
    decoder = _decoder(cell)
    stream = decoder.generate(cell.prompt(cell.layout.num_slots + OVERFILL_TOKENS), temperature=0)
    next(stream)  # the prompt is fed by now
    return Contender("generate", lambda: next(stream), decoder.cache_bytes, decoder)


def step_contender(cell: Cell) -> Contender:
    """Our decoder's step alone: a token in, logits out."""
    decoder = _decoder(cell)
    token = decoder.prefill(cell.prompt(cell.layout.num_slots + OVERFILL_TOKENS)).argmax(dim=-1)
    return Contender("step", lambda: decoder.step(token), decoder.cache_bytes, decoder)


def _decoder(cell: Cell) -> StreamingDecoder:
    return StreamingDecoder(cell.model, cell.layout.sinks, cell.layout.window, cell.batch_size)


def matmuls_contender(cell: Cell) -> Contender:
    """The matrix products of a step, over its weights and as many keys and values, and nothing else."""
    model, network, num_slots = cell.model, cell.model.config.network, cell.layout.num_slots
    assert network.intermediate_size is not None
    generator = torch.Generator(cell.device).manual_seed(SEED)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=cell.device, dtype=model.dtype)

    num_heads = cell.batch_size * network.num_attention_heads
    query, weights = drawn(num_heads, 1, network.head_dim), drawn(num_heads, 1, num_slots)
    cache_shape = (network.num_hidden_layers, num_heads, num_slots, network.head_dim)
    keys, values = drawn(*cache_shape), drawn(*cache_shape)
    inputs = {
        width: drawn(cell.batch_size, width) for width in (network.hidden_size, network.intermediate_size)
    }
    linears = [
        (inputs[part.in_features], part.weight, part.bias)
        for part in model.modules()
        if isinstance(part, nn.Linear)
    ]

    def decode() -> None:
        for x, weight, bias in linears:
            F.linear(x, weight, bias)
        for k, v in zip(keys, values, strict=True):
            torch.bmm(query, k.transpose(1, 2))
            torch.bmm(weights, v)

    return Contender(MATMULS, decode, keys.nbytes + values.nbytes, note="the step's matrix products alone")


def peer_contender(cell: Cell, peer: Peer) -> Contender:
    """A peer that has read its prompt."""
    token = peer.prefill(cell.prompt(peer.prompt_len)).argmax(dim=-1)

    def decode() -> None:
        nonlocal token
        token = peer.next_token(token)

    return Contender(peer.name, decode, peer.cache_bytes, note=peer.note)


def step_bytes(cell: Cell) -> int:
    """Bytes that a step must read: every weight but the embedding's table, K and V of all slots."""
    model, network = cell.model, cell.model.config.network
    embedding = model.gpt_neox.embed_in.weight
    weights = sum(weight.nbytes for weight in model.parameters() if weight is not embedding)
    num_held = 2 * network.num_hidden_layers * cell.batch_size * cell.layout.num_slots * network.hidden_size
    return weights + num_held * embedding.element_size()
