"""One decoding step by torch's own operations: what the CPU runs, and CUDA where the kernels do not fit.

A small model's step is hundreds of operations of microseconds, and what surrounds its matrix products
costs as much as they do. So the network is written out once more here, with views and rotations
prepared beforehand: ``sinktrain.model.neox`` by blocks is its slow twin.

Axes: batch, head, slot, head_dim, hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.places import null_slots
from sinktrain.model.rotary import angle_dtype, rotary_angles
from sinktrain.model.sinks.base import NullSlot
from sinktrain.streaming.ring import RingCache


class PlainStep:
    """Feeds one token to every stream of a cache, reading it in place.

    Args:
        model: in any dtype; its null slots are read now, all other weights at every call.
        cache: whose rows get a token each.
        tokens: int64[batch], read at every call.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, tokens: Tensor) -> None:
        self.model, self.cache, self.tokens = model, cache, tokens
        # Half-precision scores would cost more than all other roundings together.
        self.exact = angle_dtype(model.dtype)
        self.rotations = _Rotations(model, cache, self.exact)
        self.nulls = [
            None if null is None else _Null(model, null, cache.batch_size, self.exact)
            for null in null_slots(model)
        ]
        self.rows = torch.arange(cache.batch_size, device=model.device)
        self.has_one_shape = model.device.type == "cuda"  # for a graph; elsewhere empty slots are not read
        self.written = list(zip(cache.keys, cache.values, strict=True))  # of each layer
        self.read: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_read = 0

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
        if held != self.num_read:
            self.num_read, self.read = held, [self._views(*layer, held) for layer in self.written]
        is_all_seen = is_one_age and held <= cache.layout.num_slots
        self.unseen = None if is_all_seen else ~cache.visible(cache.age, held)[:, None]

    def _layer(self, index: int, layer: Layer, hidden: Tensor) -> Tensor:
        attention, normed = layer.attention, _normed(layer.input_layernorm, hidden)
        mixed = self._attend(index, _linear(attention.query_key_value, normed))
        scale = attention.sink.output_scale(normed)
        if scale is not None:
            mixed = mixed.view(*scale.shape, -1).mul_(scale.unsqueeze(-1)).view_as(mixed)
        attended = _linear(attention.dense, mixed).add_(hidden)
        mlp_input = hidden if layer.use_parallel_residual else attended
        wide = _linear(layer.mlp.dense_h_to_4h, _normed(layer.post_attention_layernorm, mlp_input))
        is_gelu = layer.mlp.activation is F.gelu and wide.dtype == self.exact
        wide = _gelu(wide) if is_gelu else layer.mlp.activation(wide)
        return _linear(layer.mlp.dense_4h_to_h, wide).add_(attended)

    def _views(self, keys: Tensor, values: Tensor, held: int) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's keys, sink keys and values as its products read them, the keys transposed."""
        columns = keys.flatten(0, 1)[:, :held].transpose(1, 2)
        return columns, columns[:, :, : self.cache.layout.sinks], values.flatten(0, 1)[:, :held]

    def _attend(self, index: int, fused: Tensor) -> Tensor:
        """float[batch, 3 * hidden] -> float[batch, hidden]."""
        batch, heads, _, head_dim = self.written[index][0].shape
        parts = fused.view(batch, heads * 3, head_dim)  # query, key and value of each head
        turned = torch.bmm(parts.to(self.exact), self.rotations.of_all).view(batch * heads, 3, 3, head_dim)
        key, value = turned[:, 1, 0].view(batch, heads, -1), parts.view(batch, heads, 3, -1)[:, :, 2]
        self._write(index, key, value)
        keys, sink_keys, values = (view.to(self.exact) for view in self.read[index])
        scores = torch.bmm(turned[:, :1, 1], keys)
        if sink_keys.shape[2]:
            scores[:, :, : sink_keys.shape[2]] = torch.bmm(turned[:, :1, 2], sink_keys)
        if self.unseen is not None:
            scores = scores.view(batch, heads, -1).masked_fill_(self.unseen, -torch.inf).view_as(scores)
        null = self.nulls[index]
        if null is None:
            mixed = torch.bmm(scores.softmax(dim=-1), values)
        else:
            mixed = null.mix(turned[:, :1, 2], scores, values)
        return mixed.view(batch, -1).to(fused.dtype)

    def _write(self, index: int, key: Tensor, value: Tensor) -> None:
        keys, values = self.written[index]
        if self.own_slot is not None:
            keys[:, :, self.own_slot] = key
            values[:, :, self.own_slot] = value
        else:
            keys[self.rows, :, self.own_slots] = key.to(keys.dtype)
            values[self.rows, :, self.own_slots] = value


class _Null:
    """A layer's null slot as batched products take it, once for each head of each row."""

    def __init__(self, model: GPTNeoX, null: NullSlot, rows: int, dtype: torch.dtype) -> None:
        key, score, value = (None if part is None else part.detach().to(dtype) for part in null)
        key = NullSlot(key).in_front(model.rotary_steps).key
        num_heads = model.config.network.num_attention_heads
        if score is None:
            score = torch.zeros(num_heads, dtype=dtype, device=model.device)
        self.score = score.view(-1, 1, 1).repeat(rows, 1, 1)
        self.key = None if key is None else key[:, :, None].repeat(rows, 1, 1)
        self.value = None if value is None else value[:, None].repeat(rows, 1, 1)

    def mix(self, at_sinks: Tensor, scores: Tensor, values: Tensor) -> Tensor:
        """Attention with one more slot.

        Args:
            at_sinks: float[batch x head, 1, head_dim], queries as they meet sinks, scaled.
            scores: float[batch x head, 1, slot], of the other slots.
            values: float[batch x head, slot, head_dim].

        Returns:
            float[batch x head, 1, head_dim].
        """
        own = self.score if self.key is None else torch.baddbmm(self.score, at_sinks, self.key)
        weights = torch.cat((own, scores), dim=-1).softmax(dim=-1)
        mixed = torch.bmm(weights[:, :, 1:], values)
        return mixed if self.value is None else mixed.addcmul_(weights[:, :, :1], self.value)


class _Rotations:
    """Rotations as one matrix a row, because a small product costs less than the operations it replaces.

    ``of_all`` is float[batch, head_dim, 3 * head_dim]. What it multiplies comes out thrice: rotated as a
    key is stored, as a query meets the ring, and as a query meets the sinks; queries are scaled too.
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, dtype: torch.dtype) -> None:
        network, rows = model.config.network, cache.batch_size
        head_dim, self.half = network.head_dim, network.rotary_ndims // 2
        self.cache, self.steps = cache, model.rotary_steps
        scale = head_dim**-0.5
        self.scales = torch.tensor([1, scale, scale], dtype=dtype, device=model.device)[:, None]
        turns = torch.eye(head_dim, dtype=dtype, device=model.device)[:, None] * self.scales
        turns = turns.repeat(rows, 1, 1, 1)  # [batch, head_dim, place, head_dim]
        self.of_all = turns.view(rows, head_dim, 3 * head_dim)
        first, second = slice(self.half), slice(self.half, 2 * self.half)
        places = ((first, first), (second, second), (first, second), (second, first))
        self.parts = [turns[:, i, :, j].diagonal(dim1=1, dim2=3) for i, j in places]  # [batch, place, half]

    def turn_to(self, age: Tensor) -> None:
        """Set the rotations of the tokens of these ages: int64[batch]."""
        if not self.half:
            return
        layout = self.cache.layout
        at_ring, at_sinks = age + self.cache.start_pos, age.clamp(max=layout.num_slots - 1)
        as_stored = torch.where(age < layout.sinks, at_sinks, at_ring)
        rotary_pos = torch.stack((as_stored, at_ring, at_sinks), dim=1)
        angles = rotary_angles(rotary_pos, self.steps, self.of_all.dtype)
        cos, sin = (part[..., : self.half] * self.scales for part in angles)
        for part, value in zip(self.parts, (cos, cos, sin, -sin), strict=True):
            part.copy_(value)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _gelu(x: Tensor) -> Tensor:
    """``F.gelu`` without the tenth of a millisecond that its CPU kernel needs to start."""
    return torch.erf(x * 0.5**0.5).add_(1).mul_(x).mul_(0.5)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)
