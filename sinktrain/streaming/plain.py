"""One decoding step by torch's own operations: what the CPU runs, and CUDA where the kernels do not fit.

A small model's step is a hundred operations of microseconds, and what surrounds its matrix products
costs as much as they do. So the network is written out once more here, with nothing between two
products that can be prepared beforehand: ``sinktrain.model.neox`` by blocks is its slow twin.

Axes: batch, head, slot, head_dim, hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.rotary import angle_dtype, rotary_angles
from sinktrain.streaming.ring import RingCache


class PlainStep:
    """Feeds one token to every stream of a cache, reading it in place.

    Args:
        model: in any dtype.
        cache: whose rows get a token each.
        tokens: int64[batch], read at every call.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, tokens: Tensor) -> None:
        self.model, self.cache, self.tokens = model, cache, tokens
        # Half-precision scores would cost more than all other roundings together.
        self.exact = angle_dtype(model.dtype)
        self.rotations = _Rotations(model, cache, self.exact)
        self.rows = torch.arange(cache.batch_size, device=model.device)
        self.has_one_shape = model.device.type == "cuda"  # for a graph; elsewhere empty slots are not read

    def __call__(self) -> Tensor:
        """Feed ``tokens``; returns logits, dtype[batch, vocab].

        The rows age on the device alone: the cache's bounds are the caller's to shift.
        """
        cache, backbone = self.cache, self.model.gpt_neox
        self.rotations.turn_to(cache.age)
        self._look_at_slots()
        hidden = F.embedding(self.tokens, backbone.embed_in.weight)
        for index, layer in enumerate(backbone.layers):
            assert isinstance(layer, Layer)
            hidden = self._layer(index, layer, hidden)
        cache.write_tokens(self.tokens[:, None])
        return F.linear(_normed(backbone.final_layer_norm, hidden), self.model.embed_out.weight)

    def _look_at_slots(self) -> None:
        """Find the slots to write and to read, for all layers."""
        cache = self.cache
        is_one_age = cache.min_age == cache.max_age and not self.has_one_shape
        self.own_slot = cache.slot(cache.max_age) if is_one_age else None
        self.own_slots = cache.slots(cache.age)
        held = cache.num_slots if self.has_one_shape else min(cache.max_age + 1, cache.num_slots)
        self.keys, self.values = cache.keys[:, :, :, :held], cache.values[:, :, :, :held]
        is_all_seen = is_one_age and held <= cache.layout.num_slots
        self.unseen = None if is_all_seen else ~cache.visible(cache.age, held)[:, None]

    def _layer(self, index: int, layer: Layer, hidden: Tensor) -> Tensor:
        fused = _linear(layer.attention.query_key_value, _normed(layer.input_layernorm, hidden))
        mixed = self._attend(index, fused)
        attended = _linear(layer.attention.dense, mixed).add_(hidden)
        mlp_input = hidden if layer.use_parallel_residual else attended
        wide = layer.mlp.activation(
            _linear(layer.mlp.dense_h_to_4h, _normed(layer.post_attention_layernorm, mlp_input))
        )
        return _linear(layer.mlp.dense_4h_to_h, wide).add_(attended)

    def _attend(self, index: int, fused: Tensor) -> Tensor:
        """float[batch, 3 * hidden] -> float[batch, hidden]."""
        batch, heads, _, head_dim = self.keys[index].shape
        q, k, v = fused.view(batch, heads, 3, head_dim).unbind(dim=2)
        self._write(index, torch.bmm(k.to(self.exact), self.rotations.of_key), v)
        turned = torch.bmm(q.to(self.exact), self.rotations.of_query)  # for the ring, and for the sinks
        turned = turned.view(batch * heads, 1, 2 * head_dim)
        keys = self.keys[index].to(self.exact).flatten(0, 1).transpose(1, 2)
        scores = torch.bmm(turned[:, :, :head_dim], keys)
        sinks = min(self.cache.layout.sinks, scores.shape[-1])
        if sinks:
            scores[:, :, :sinks] = torch.bmm(turned[:, :, head_dim:], keys[:, :, :sinks])
        if self.unseen is not None:
            scores = scores.view(batch, heads, -1).masked_fill_(self.unseen, -torch.inf).view_as(scores)
        values = self.values[index].to(self.exact).flatten(0, 1)
        return torch.bmm(scores.softmax(dim=-1), values).view(batch, -1).to(fused.dtype)

    def _write(self, index: int, key: Tensor, value: Tensor) -> None:
        keys, values = self.cache.keys[index], self.cache.values[index]
        if self.own_slot is not None:
            keys[:, :, self.own_slot] = key
            values[:, :, self.own_slot] = value
        else:
            keys[self.rows, :, self.own_slots] = key.to(keys.dtype)
            values[self.rows, :, self.own_slots] = value


class _Rotations:
    """Rotations as matrices, because one small product costs less than the six operations it replaces.

    ``of_key`` is float[batch, head_dim, head_dim]; ``of_query``, which also scales, is float[batch,
    head_dim, 2 * head_dim]: as ring keys meet the query, and as the sinks do.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, dtype: torch.dtype) -> None:
        head_dim, rows = model.config.network.head_dim, cache.batch_size
        self.cache, self.steps, self.scale = cache, model.rotary_steps, head_dim**-0.5
        turn = torch.eye(head_dim, dtype=dtype, device=model.device).repeat(rows, 3, 1, 1)
        turn[:, 1:] *= self.scale
        own, query = turn[:, 0].clone(), turn[:, 1:].transpose(1, 2).contiguous()
        self.of_key, self.of_query = own, query.view(rows, head_dim, 2 * head_dim)
        self.half = model.config.network.rotary_ndims // 2
        self.key_parts, self.query_parts = _parts(own, self.half), _parts(query.transpose(1, 2), self.half)

    def turn_to(self, age: Tensor) -> None:
        """Set the rotations of the tokens of these ages: int64[batch]."""
        if not self.half:
            return
        layout = self.cache.layout
        rotary_pos = torch.stack((age + self.cache.start_pos, age.clamp(max=layout.num_slots - 1)), dim=1)
        cos, sin = rotary_angles(rotary_pos, self.steps, self.of_key.dtype)
        cos, sin = cos[..., : self.half], sin[..., : self.half]  # [batch, place, half]
        _set(self.query_parts, cos * self.scale, sin * self.scale)
        is_sink = (age < layout.sinks)[:, None]
        _set(self.key_parts, *(torch.where(is_sink, part[:, 1], part[:, 0]) for part in (cos, sin)))


def _parts(turn: Tensor, half: int) -> tuple[Tensor, ...]:
    """Where a rotation that multiplies from the right has its cosines, twice, its sine and minus its sine."""
    first, second = slice(half), slice(half, 2 * half)
    places = ((first, first), (second, second), (first, second), (second, first))
    return tuple(turn[..., rows, columns].diagonal(dim1=-2, dim2=-1) for rows, columns in places)


def _set(parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> None:
    for part, value in zip(parts, (cos, cos, sin, -sin), strict=True):
        part.copy_(value)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)
