"""Slow twins that are plainly right: token by token in numpy float64, keys in lists, angles of their own.

Of the code under test they use the weights and the sizes, and what a sink kind says of itself: its null
slot and its scale. ``gathered_stream``, which is fast enough for long streams, also uses the layers
around attention.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sinktrain.model.config import ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS, AttentionSink, NullSlot

Array = NDArray[np.float64]
Attend = Callable[[int, Array, Array, Array], Array]
VOCAB = 97

TINY = NetworkConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=256,
)


def tiny_model(
    seed: int = 0,
    sinks: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    kind: str | None = None,
    **sizes: Any,
) -> GPTNeoX:
    """Two layers, width 32, with every parameter random and large enough that a position bug shows.

    Args:
        sinks: sink tokens; (90,) for a kind that has them when empty.
        kind: ``token`` or ``none``, as ``sinks`` says, when None.
    """
    kind = kind or ("token" if sinks else "none")
    sinks = sinks or ((90,) if KINDS[kind].has_tokens else ())
    sink = SinkConfig(kind, len(sinks), sinks)
    return _drawn(GPTNeoX(ModelConfig(dataclasses.replace(TINY, **sizes), sink)), seed, dtype)


class EveryPart(AttentionSink):
    """A kind that is not registered: its null slot has all parts, and it scales what heads put out."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.key, self.value = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))
        self.score = nn.Parameter(torch.empty(num_heads))
        self.gate = nn.Parameter(torch.empty(num_heads, hidden_size))

    def null_slot(self) -> NullSlot:
        key, value = (part.view(len(self.score), -1) for part in (self.key, self.value))
        return NullSlot(key, self.score, value)

    def output_scale(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x @ self.gate.T)


def model_with_every_part(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> GPTNeoX:
    """``tiny_model`` with ``EveryPart`` in its layers."""
    network = dataclasses.replace(TINY, **sizes)
    model = GPTNeoX(ModelConfig(network))
    for layer in model.gpt_neox.layers:
        layer.attention.sink = EveryPart(network.hidden_size, network.num_attention_heads)
    return _drawn(model, seed, dtype)


def _drawn(model: GPTNeoX, seed: int, dtype: torch.dtype) -> GPTNeoX:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            vector = 1.5 if ".sink." in name else 0.1
            parameter.copy_(drawn * (1.7 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else vector))
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return model.to(dtype).requires_grad_(False)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens below 90: ids 90 to 96 are left for sinks."""
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


def rotate_everything_stream(model: GPTNeoX, tokens: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """StreamingLLM as its authors wrote it: unrotated keys, all of them rotated again for every token.

    A null slot is the first of them, and takes no room from tokens.

    int64[batch, seq] -> float64[batch, seq, vocab].
    """

    def stream() -> Attend:
        kept: dict[int, list[tuple[Array, Array]]] = {}

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            rows = [*kept.get(layer, []), (k, v)]
            if len(rows) > sinks + window:
                rows = rows[:sinks] + rows[-window:]
            kept[layer] = rows
            null = _sink(model, layer).null_slot()
            first = 0 if null is None else 1
            keys = [_rotate(model, key, first + rank) for rank, (key, _) in enumerate(rows)]
            query = _rotate(model, q, first + len(rows) - 1)
            return _softmax_mix(query, keys, [value for _, value in rows], null)[0]

        return attend

    return _each_row(model, tokens, stream)


def gathered_stream(
    model: GPTNeoX, tokens: torch.Tensor, sinks: int, window: int, at: Sequence[int] | None = None
) -> torch.Tensor:
    """``rotate_everything_stream`` for many tokens at once: each gathers the keys that it sees, oldest
    first and not rotated, and rotates all of them by their rank, a null slot's coming first.

    Args:
        at: the tokens whose logits are wanted, all when None. Others than all only for models of one
            layer, whose keys owe nothing to attention.

    Returns:
        float64[batch, at, vocab].
    """
    network = model.config.network
    if model.dtype != torch.float64:
        model = copy.deepcopy(model).double()
    assert at is None or network.num_hidden_layers == 1
    wanted = torch.arange(tokens.shape[1]) if at is None else torch.tensor(at)
    half = int(network.head_dim * network.rotary_pct) // 2
    ranks = torch.arange(sinks + window)
    angles = torch.arange(1 + len(ranks))[:, None] * network.rotary_emb_base ** (
        -torch.arange(half).double() / max(half, 1)
    )

    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        first, second, passed = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)

    def attend(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, null: NullSlot | None = None
    ) -> torch.Tensor:
        mixed, first = torch.zeros_like(q), 0 if null is None else 1
        null_key, null_score, null_value = map(torch.from_numpy, _parts(null, q.shape[1], q.shape[3]))
        for ages in wanted.split(64):
            seen = [
                [key for key in range(age + 1) if key < sinks or key > age - window] for age in ages.tolist()
            ]
            newest = torch.tensor([len(keys) - 1 for keys in seen])  # its rank, which is the query's too
            padded = torch.tensor([keys + [0] * (len(ranks) - len(keys)) for keys in seen])
            keys = rotate(k[:, :, padded], angles[first + ranks])  # [batch, head, query, rank, head_dim]
            query = rotate(q[:, :, ages], angles[first + newest])
            own = (query * null_key[:, None]).sum(dim=-1, keepdim=True)
            scores = torch.cat((own, (keys @ query[..., None]).squeeze(-1)), dim=-1)
            scores /= math.sqrt(network.head_dim)
            scores[..., 0] += null_score[:, None]
            scores[..., 1:].masked_fill_(ranks > newest[:, None], -torch.inf)
            weights = scores.softmax(dim=-1)
            mixed[:, :, ages] = weights[..., :1] * null_value[:, None]
            mixed[:, :, ages] += (weights[..., None, 1:] @ v[:, :, padded]).squeeze(-2)
        return mixed

    with torch.no_grad():
        return model.logits(model.hidden(tokens, attend)[:, wanted])


def dense_forward(model: GPTNeoX, tokens: torch.Tensor) -> torch.Tensor:
    """Every token sees all before it: int64[batch, seq] -> float64[batch, seq, vocab]."""

    def stream() -> Attend:
        keys: dict[int, list[Array]] = {}
        values: dict[int, list[Array]] = {}

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            seen, seen_values = keys.setdefault(layer, []), values.setdefault(layer, [])
            null = _sink(model, layer).null_slot()
            position = len(seen) + (0 if null is None else 1)
            seen.append(_rotate(model, k, position))
            seen_values.append(v)
            return _softmax_mix(_rotate(model, q, position), seen, seen_values, null)[0]

        return attend

    return _each_row(model, tokens, stream)


def _each_row(model: GPTNeoX, tokens: torch.Tensor, stream: Callable[[], Attend]) -> torch.Tensor:
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    sinks = [copy.deepcopy(_sink(model, layer)).double() for layer in range(len(model.gpt_neox.layers))]
    rows = []
    for row in tokens.tolist():
        attend = stream()
        rows.append(np.stack([_token_logits(model, weights, sinks, token, attend) for token in row]))
    return torch.from_numpy(np.stack(rows))


def _token_logits(
    model: GPTNeoX, weights: dict[str, Array], sinks: list[AttentionSink], token: int, attend: Attend
) -> Array:
    network = model.config.network

    def linear(x: Array, name: str) -> Array:
        bias = weights.get(f"{name}.bias", np.zeros(1))
        return np.asarray(weights[f"{name}.weight"] @ x + bias)

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean()
        unit = centred / np.sqrt((centred**2).mean() + network.layer_norm_eps)
        return np.asarray(unit * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    hidden = weights["gpt_neox.embed_in.weight"][token]
    for index in range(network.num_hidden_layers):
        layer = f"gpt_neox.layers.{index}"
        normed = norm(hidden, f"{layer}.input_layernorm")
        fused = linear(normed, f"{layer}.attention.query_key_value")
        heads = fused.reshape(network.num_attention_heads, 3, network.head_dim)
        mixed = attend(index, heads[:, 0], heads[:, 1], heads[:, 2])
        scale = sinks[index].output_scale(torch.from_numpy(normed))
        if scale is not None:
            mixed = mixed * scale.detach().numpy()[:, None]
        attended = hidden + linear(mixed.reshape(-1), f"{layer}.attention.dense")
        mlp_input = hidden if network.use_parallel_residual else attended
        inner = linear(norm(mlp_input, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h")
        gelu = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in inner])
        hidden = attended + linear(gelu, f"{layer}.mlp.dense_4h_to_h")
    return linear(norm(hidden, "gpt_neox.final_layer_norm"), "embed_out")


def _rotate(model: GPTNeoX, x: Array, position: int) -> Array:
    """Rotate float64[head, head_dim]: dimensions i and i + half turn together."""
    network = model.config.network
    half = int(network.head_dim * network.rotary_pct) // 2
    angle = position * network.rotary_emb_base ** (-np.arange(half) / max(half, 1))
    cos, sin = np.cos(angle), np.sin(angle)
    turned = x.copy()
    turned[:, :half] = x[:, :half] * cos - x[:, half : 2 * half] * sin
    turned[:, half : 2 * half] = x[:, half : 2 * half] * cos + x[:, :half] * sin
    return turned


def _softmax_mix(
    q: Array, keys: list[Array], values: list[Array], null: NullSlot | None
) -> tuple[Array, Array]:
    """One softmax over a null slot and all keys, head by head.

    Returns:
        What they mix to, float64[head, head_dim], and the weights of the keys, float64[key, head].
    """
    null_key, null_score, null_value = _parts(null, *q.shape)
    scores = np.stack([(q * key).sum(axis=-1) for key in (null_key, *keys)]) / math.sqrt(q.shape[-1])
    scores[0] += null_score
    weights = np.exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    slots = zip(weights, (null_value, *values), strict=True)
    return np.asarray(sum(weight[:, None] * value for weight, value in slots)), weights[1:]


def _sink(model: GPTNeoX, layer: int) -> AttentionSink:
    sink = model.gpt_neox.layers[layer].attention.sink
    assert isinstance(sink, AttentionSink)
    return sink


def _parts(null: NullSlot | None, num_heads: int, head_dim: int) -> tuple[Array, Array, Array]:
    """A null slot's key, score and value in float64; one that is not there scores minus infinity."""
    nothing = NullSlot(score=torch.full((num_heads,), -torch.inf))
    shapes = ((num_heads, head_dim), (num_heads,), (num_heads, head_dim))
    key, score, value = (
        np.zeros(shape) if part is None else part.detach().double().numpy()
        for part, shape in zip(nothing if null is None else null, shapes, strict=True)
    )
    return key, score, value


def attention_weights(model: GPTNeoX, tokens: torch.Tensor) -> Array:
    """Causal weights: int64[batch, seq] -> float64[batch, layer, head, query, key], 0 for later keys.

    What they lack to 1 is a null slot's.
    """
    network = model.config.network
    length = tokens.shape[1]
    recorded: list[Array] = []

    def stream() -> Attend:
        weights = np.zeros((network.num_hidden_layers, network.num_attention_heads, length, length))
        keys: dict[int, list[Array]] = {}
        values: dict[int, list[Array]] = {}
        recorded.append(weights)

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            seen, seen_values = keys.setdefault(layer, []), values.setdefault(layer, [])
            null, row = _sink(model, layer).null_slot(), len(seen)
            position = row + (0 if null is None else 1)
            seen.append(_rotate(model, k, position))
            seen_values.append(v)
            mixed, of_keys = _softmax_mix(_rotate(model, q, position), seen, seen_values, null)
            weights[layer, :, row, : row + 1] = of_keys.T
            return mixed

        return attend

    _each_row(model, tokens, stream)
    return np.stack(recorded)


def skipped_steps(losses: Sequence[float], norms: Sequence[float], sigma: float | None) -> list[bool]:
    """Which steps ``SpikeGuard`` leaves out, given all losses and gradient norms: float64, lists, numpy."""
    window: list[float] = []
    skipped = []
    for loss, norm in zip(losses, norms, strict=True):
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        is_spike = False
        if is_finite and sigma is not None and len(window) >= 64:
            is_spike = loss > np.mean(window) + sigma * np.std(window, ddof=1)
        skipped.append(is_spike or not is_finite)
        if is_finite:
            window = [*window, loss][-128:]
    return skipped
