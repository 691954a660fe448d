"""Slow twins that are plainly right: token by token in numpy float64, keys in lists, angles of their own.

Of the code under test they use the weights and the sizes, nothing else; ``gathered_stream``, which is
fast enough for long streams, also uses the layers around attention.
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

from sinktrain.model.config import ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.neox import GPTNeoX

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
    seed: int = 0, sinks: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, **sizes: Any
) -> GPTNeoX:
    """Two layers, width 32, with every parameter random and large enough that a position bug shows."""
    sink = SinkConfig("token", len(sinks), sinks) if sinks else SinkConfig()
    model = GPTNeoX(ModelConfig(dataclasses.replace(TINY, **sizes), sink))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * (1.7 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1))
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return model.to(dtype).requires_grad_(False)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens below 90: ids 90 to 96 are left for sinks."""
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


def rotate_everything_stream(model: GPTNeoX, tokens: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """StreamingLLM as its authors wrote it: unrotated keys, all of them rotated again for every token.

    int64[batch, seq] -> float64[batch, seq, vocab].
    """

    def stream() -> Attend:
        kept: dict[int, list[tuple[Array, Array]]] = {}

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            rows = [*kept.get(layer, []), (k, v)]
            if len(rows) > sinks + window:
                rows = rows[:sinks] + rows[-window:]
            kept[layer] = rows
            keys = [_rotate(model, key, rank) for rank, (key, _) in enumerate(rows)]
            return _softmax_mix(_rotate(model, q, len(rows) - 1), keys, [value for _, value in rows])

        return attend

    return _each_row(model, tokens, stream)


def gathered_stream(
    model: GPTNeoX, tokens: torch.Tensor, sinks: int, window: int, at: Sequence[int] | None = None
) -> torch.Tensor:
    """``rotate_everything_stream`` for many tokens at once: each gathers the keys that it sees, oldest
    first and not rotated, and rotates all of them by their rank.

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
    angles = ranks[:, None] * network.rotary_emb_base ** (-torch.arange(half).double() / max(half, 1))

    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        first, second, passed = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mixed = torch.zeros_like(q)
        for ages in wanted.split(64):
            seen = [
                [key for key in range(age + 1) if key < sinks or key > age - window] for age in ages.tolist()
            ]
            newest = torch.tensor([len(keys) - 1 for keys in seen])  # its rank, which is the query's too
            padded = torch.tensor([keys + [0] * (len(ranks) - len(keys)) for keys in seen])
            keys = rotate(k[:, :, padded], angles)  # [batch, head, query, rank, head_dim]
            query = rotate(q[:, :, ages], angles[newest])
            scores = (keys @ query[..., None]).squeeze(-1) / math.sqrt(network.head_dim)
            weights = scores.masked_fill(ranks > newest[:, None], -torch.inf).softmax(dim=-1)
            mixed[:, :, ages] = (weights[..., None, :] @ v[:, :, padded]).squeeze(-2)
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
            position = len(seen)
            seen.append(_rotate(model, k, position))
            seen_values.append(v)
            return _softmax_mix(_rotate(model, q, position), seen, seen_values)

        return attend

    return _each_row(model, tokens, stream)


def _each_row(model: GPTNeoX, tokens: torch.Tensor, stream: Callable[[], Attend]) -> torch.Tensor:
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    rows = []
    for row in tokens.tolist():
        attend = stream()
        rows.append(np.stack([_token_logits(model, weights, token, attend) for token in row]))
    return torch.from_numpy(np.stack(rows))


def _token_logits(model: GPTNeoX, weights: dict[str, Array], token: int, attend: Attend) -> Array:
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
        fused = linear(norm(hidden, f"{layer}.input_layernorm"), f"{layer}.attention.query_key_value")
        heads = fused.reshape(network.num_attention_heads, 3, network.head_dim)
        mixed = attend(index, heads[:, 0], heads[:, 1], heads[:, 2]).reshape(-1)
        attended = hidden + linear(mixed, f"{layer}.attention.dense")
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


def _softmax_mix(q: Array, keys: list[Array], values: list[Array]) -> Array:
    """One softmax over all keys, head by head: float64[head, head_dim]."""
    scores = np.stack([(q * key).sum(axis=-1) for key in keys]) / math.sqrt(q.shape[-1])  # [key, head]
    weights = np.exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    return np.asarray(sum(weight[:, None] * value for weight, value in zip(weights, values, strict=True)))


def attention_weights(model: GPTNeoX, tokens: torch.Tensor) -> Array:
    """Causal weights: int64[batch, seq] -> float64[batch, layer, head, query, key], 0 for later keys."""
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
            row = len(seen)
            query = _rotate(model, q, row)
            seen.append(_rotate(model, k, row))
            seen_values.append(v)
            for head in range(network.num_attention_heads):
                scores = np.array([query[head] @ key[head] for key in seen]) / math.sqrt(network.head_dim)
                exponents = np.exp(scores - scores.max())
                weights[layer, head, row, : row + 1] = exponents / exponents.sum()
            return _softmax_mix(query, seen, seen_values)

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
