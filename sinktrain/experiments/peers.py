"""Other ways to decode the same weights, for ``sinktrain bench decode --peers``.

transformers with the caches that it has, the sliding window computed anew for every token (the
paper's baseline), and the paper's own cache. They are here to be timed, so each is written as its
users run it; that each is also right is shown in tests/test_bench.py.

Axes: batch, head, seq, head_dim, vocab.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from sinktrain.errors import SinktrainError
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.model.sinks.base import KINDS, NullSlot
from sinktrain.model.transformers_format import to_transformers_config
from sinktrain.streaming.layout import Layout

PREFILL_BLOCK = 256
"""Tokens that the cat-and-rotate cache is fed at once before it is full; bounds its matrix of scores."""


class Peer(ABC):
    """One way to continue ``batch_size`` streams, with about as many keys in sight as the layout has slots.

    Attributes:
        name: of its row.
        note: what a reader of the row must know.
        prompt_len: tokens to prefill it with.
        max_tokens: tokens that it can decode then; None where there is no end.
        is_compiled: whether it leaves compiled code behind.
    """

    name: ClassVar[str]
    is_compiled: ClassVar[bool] = False
    note: str
    prompt_len: int
    max_tokens: int | None = None

    @abstractmethod
    def __init__(self, model: GPTNeoX, layout: Layout, batch_size: int) -> None: ...

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Tensor:
        """int64[batch, prompt_len] -> float[batch, vocab], logits for the next token."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """int64[batch] -> float[batch, vocab]."""

    def next_token(self, tokens: Tensor) -> Tensor:
        """The most probable token after these: int64[batch] -> int64[batch]."""
        return self.step(tokens).argmax(dim=-1)

    @property
    @abstractmethod
    def cache_bytes(self) -> int: ...


class DynamicCachePeer(Peer):
    """transformers, not compiled, with the cache that it takes by default: grown by ``torch.cat``."""

    name = "transformers-dynamic"
    note = "DynamicCache, sdpa, not compiled; cropped to S+W - 1 tokens before each"

    def __init__(self, model: GPTNeoX, layout: Layout, batch_size: int) -> None:
        from transformers import DynamicCache

        self.network = as_transformers(model)
        self.cache = DynamicCache(config=self.network.config)
        self.prompt_len = max(1, layout.num_slots - 1)

    def prefill(self, tokens: Tensor) -> Tensor:
        return _last_logits(self.network, tokens, self.cache)

    def step(self, tokens: Tensor) -> Tensor:
        logits = _last_logits(self.network, tokens[:, None], self.cache)
        self.cache.crop(-1)
        return logits

    @property
    def cache_bytes(self) -> int:
        return _cache_bytes(self.cache)


class StaticCachePeer(Peer):
    """transformers' fastest: a cache of fixed size and the step compiled, on CUDA into one graph."""

    name = "transformers-static"
    is_compiled = True

    def __init__(self, model: GPTNeoX, layout: Layout, batch_size: int) -> None:
        from transformers import StaticCache

        if model.device.type == "cpu" and not has_cpp_compiler():
            raise SinktrainError("skipped: torch.compile finds no C++ compiler; install g++")
        self.network = as_transformers(model)
        self.cache = StaticCache(config=self.network.config, max_cache_len=layout.num_slots)
        self.prompt_len = max(1, layout.num_slots // 4)
        self.max_tokens = layout.num_slots - self.prompt_len
        self.note = (
            f"StaticCache, compiled, reduce-overhead; dense, stops when its {layout.num_slots} are full"
        )
        self._compiled = torch.compile(self._most_probable, mode="reduce-overhead", fullgraph=True)

    def prefill(self, tokens: Tensor) -> Tensor:
        return _last_logits(self.network, tokens, self.cache)

    def step(self, tokens: Tensor) -> Tensor:
        return _last_logits(self.network, tokens[:, None], self.cache)

    def next_token(self, tokens: Tensor) -> Tensor:
        if tokens.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._compiled(tokens).clone()  # the graph overwrites its output

    def _most_probable(self, tokens: Tensor) -> Tensor:
        return self.step(tokens).argmax(dim=-1)

    @property
    def cache_bytes(self) -> int:
        return _cache_bytes(self.cache)


class RecomputePeer(Peer):
    """The paper's baseline: the newest S+W tokens anew for every token, a model's own sinks in front."""

    name = "recompute"
    note = "transformers, sdpa, not compiled: the whole window anew for every token"

    def __init__(self, model: GPTNeoX, layout: Layout, batch_size: int) -> None:
        self.network = as_transformers(model)
        self.prompt_len = layout.num_slots
        self.num_sinks = min(len(model.sink_ids), layout.num_slots - 1)

    def prefill(self, tokens: Tensor) -> Tensor:
        self.held = tokens
        return _last_logits(self.network, self.held, None)

    def step(self, tokens: Tensor) -> Tensor:
        sinks, newest = self.held[:, : self.num_sinks], self.held[:, self.num_sinks + 1 :]
        return self.prefill(torch.cat((sinks, newest, tokens[:, None]), dim=1))

    @property
    def cache_bytes(self) -> int:
        return 0


class CatAndRotatePeer(Peer):
    """The paper's cache: unrotated keys, all of them rotated for every token at their rank; grown by ``cat``.

    On our own network, so that the row shows the cache alone. The authors keep ``recent`` tokens
    besides the current one; one fewer than our window.

    Source: mit-han-lab/streaming-llm (MIT), kv_cache.py and pos_shift/modify_gpt_neox.py at 2e50426.
    """

    name = "cat-and-rotate"
    note = "the paper's cache on our network, not compiled"

    def __init__(self, model: GPTNeoX, layout: Layout, batch_size: int) -> None:
        network = model.config.network
        self.model = model
        self.sinks, self.recent = layout.sinks, layout.window - 1
        self.prompt_len = max(1, layout.num_slots - 1)
        self.scale = network.head_dim**-0.5
        empty = torch.empty(
            (batch_size, network.num_attention_heads, 0, network.head_dim),
            dtype=model.dtype,
            device=model.device,
        )
        self.keys = [empty] * network.num_hidden_layers
        self.values = [empty] * network.num_hidden_layers
        ranks = torch.arange(layout.num_slots, device=model.device)
        cos, sin = rotary_angles(ranks, model.rotary_steps, angle_dtype(model.dtype))
        self.cos, self.sin = cos.to(model.dtype), sin.to(model.dtype)

    def prefill(self, tokens: Tensor) -> Tensor:
        for block in torch.split(tokens, PREFILL_BLOCK, dim=1):
            hidden = self.model.hidden(block, self._attend)
        self._evict()
        return self.model.logits(hidden[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens[:, None])

    @property
    def cache_bytes(self) -> int:
        return sum(held.nbytes for held in (*self.keys, *self.values))

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        if null is not None:
            raise SinktrainError("skipped: the paper's cache has no place for this model's sink")
        keys = self.keys[layer] = torch.cat((self.keys[layer], k), dim=2)
        values = self.values[layer] = torch.cat((self.values[layer], v), dim=2)
        num_keys, num_old = keys.shape[2], keys.shape[2] - q.shape[2]
        query = apply_rotary(q, self.cos[num_old:num_keys], self.sin[num_old:num_keys])
        keys = apply_rotary(keys, self.cos[:num_keys], self.sin[:num_keys])
        scores = query @ keys.transpose(-1, -2) * self.scale
        if q.shape[2] > 1:
            is_future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(num_old + 1)
            scores = scores.masked_fill(is_future, -torch.inf)
        mixed: Tensor = scores.softmax(dim=-1) @ values
        return mixed

    def _evict(self) -> None:
        num_keys = self.keys[0].shape[2]
        if num_keys > self.sinks + self.recent:
            self.keys = [self._kept(keys, num_keys) for keys in self.keys]
            self.values = [self._kept(values, num_keys) for values in self.values]

    def _kept(self, held: Tensor, num_keys: int) -> Tensor:
        return torch.cat((held[:, :, : self.sinks], held[:, :, num_keys - self.recent :]), dim=2)


PEERS: tuple[type[Peer], ...] = (DynamicCachePeer, StaticCachePeer, RecomputePeer, CatAndRotatePeer)


def as_transformers(model: GPTNeoX) -> Any:
    """transformers' network around the very same weights; nothing is copied."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    if KINDS[model.config.sink.kind].loads_as != "plain":
        raise SinktrainError("skipped: stock GPT-NeoX has no place for this model's sink")
    settings = to_transformers_config(model.config, bos_token_id=None, eos_token_id=None)
    config = GPTNeoXConfig(**settings, attn_implementation="sdpa")
    with torch.device("meta"):
        network = GPTNeoXForCausalLM(config)
    # Its frequencies are in no state dict, so they are made again where they can be computed.
    network.gpt_neox.rotary_emb = type(network.gpt_neox.rotary_emb)(config)
    weights = model.state_dict()
    weights["lm_head.weight"] = weights.pop("embed_out.weight")
    network.load_state_dict(weights, assign=True)
    return network.to(model.device).eval().requires_grad_(False)


def has_cpp_compiler() -> bool:
    """Whether torch.compile could build for the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def _last_logits(network: Any, tokens: Tensor, cache: Any) -> Tensor:
    """int64[batch, seq] -> float[batch, vocab]."""
    output = network(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits


def _cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
