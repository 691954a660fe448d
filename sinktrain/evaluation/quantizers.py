"""Simulated quantisation: models that compute with values rounded to few bits, but kept in floats.

Losses are those of integer arithmetic, up to the rounding of float32; nothing gets faster. Rounding is
torch's own ``fake_quantize``. torchao, which would replace the layers by integer ones, has nothing for a
cache or for a slot that stays exact, and torch's modules around these functions (``torch.ao``) are on the
way out.

- *W8A8*: weights and inputs of the four linear layers of each block; embedding, head, norms, attention
  itself, and what a sink kind adds (null slots, gates) stay as they are. Weights have a scale for each
  output, inputs one for each token, found as it comes, or one for all, found beforehand on other text: all
  symmetric (as in https://docs.vllm.ai/en/latest/features/quantization/int8/ and in SmoothQuant, arXiv
  2211.10438).
- *Cache*: keys and values, each with its own smallest and largest value for each token and head, keys as
  the ring stores them, rotated (as LMDeploy does: its "INT4/INT8 KV Cache" and ``fill_kv_cache.py``). Each is
  rounded once, when it is written, and every query reads what was written, its own token's included.

A slot that is kept in full precision is computed as in the original model, weights and all, from the
embedding on: what it puts into the cache could be stored once (IntactKV, arXiv 2403.01241; PrefixQuant, arXiv
2410.05265).

Axes: batch, seq, head, head_dim; in and out of a linear layer; row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles
from sinktrain.streaming.band import march
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import Layout

LINEAR_NAMES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
"""What W8A8 quantises in each layer."""

Kind = Literal["static", "token", "cache"]
FLOATS = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Scheme:
    """What is quantised, and how finely.

    Args:
        name: as ``--quantize`` has it.
        kind: W8A8 with ``static`` scales of activations or with one for each ``token``, or the ``cache``.
        bits: of a value.
    """

    name: str
    kind: Kind
    bits: int


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8-static", "static", 8),
        Scheme("w8a8-token", "token", 8),
        Scheme("kv8", "cache", 8),
        Scheme("kv4", "cache", 4),
    )
}


# -- rounding ---------------------------------------------------------------------------------------


def round_to_range(x: Tensor, largest: float, bits: int) -> Tensor:
    """One symmetric scale for all: ``largest`` is the greatest integer, and what is larger is cut off."""
    top = _top(bits)
    return torch.fake_quantize_per_tensor_affine(x, max(largest / top, FLOATS.tiny), 0, -top, top)


def round_rows(x: Tensor, bits: int) -> Tensor:
    """A symmetric scale for each row: float[…, row] -> the same shape."""
    top = _top(bits)
    rows = x.flatten(0, -2)
    scale = (rows.abs().amax(dim=-1) / top).float().clamp(min=FLOATS.tiny)
    rounded = torch.fake_quantize_per_channel_affine(rows, scale, torch.zeros_like(scale), 0, -top, top)
    return rounded.view(x.shape)


def round_rows_between_ends(x: Tensor, bits: int) -> Tensor:
    """A scale and a zero for each row, so that its ends are the ends of the integers.

    float[…, row] -> the same shape. The zero is a float, so that it costs no precision.
    """
    last = 2**bits - 1
    rows = x.flatten(0, -2)
    low, high = rows.aminmax(dim=-1)
    floor = FLOATS.eps * torch.maximum(low.abs(), high.abs())  # of rows that are all alike
    scale = torch.maximum((high - low) / last, floor).float().clamp(min=FLOATS.tiny)
    rounded = torch.fake_quantize_per_channel_affine(rows, scale, (-low / scale).float(), 0, 0, last)
    return rounded.view(x.shape)


def _top(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


# -- models -----------------------------------------------------------------------------------------


class BlockAges:
    """Which of the tokens that a model is being fed stand in the slots of sinks.

    Streams march in step and are fed block by block, so one number tells how old all are.

    Args:
        model: told of each block by its embedding.
        num_slots: of sinks, at the front of each stream.
    """

    def __init__(self, model: GPTNeoX, num_slots: int) -> None:
        self.num_slots = num_slots
        self.rotary_steps, self.dtype = model.rotary_steps, angle_dtype(model.dtype)
        self.restart()
        model.gpt_neox.embed_in.register_forward_pre_hook(self._begin)

    def restart(self) -> None:
        """Say that the next block is the first of new streams."""
        self.age = self.num_tokens = 0

    def _begin(self, embedding: nn.Module, inputs: tuple[Tensor]) -> None:
        self.age, self.num_tokens = self.age + self.num_tokens, inputs[0].shape[1]
        ages = torch.arange(self.age, self.age + self.num_tokens, device=inputs[0].device)
        cos, sin = rotary_angles(ages, self.rotary_steps, self.dtype)
        self.angles = cos[:, None], sin[:, None]  # [seq, 1 (for head), rotary_ndims]

    @property
    def num_in_sinks(self) -> int:
        """How many tokens of the block, its first ones, stand in the slots of sinks."""
        return min(max(self.num_slots - self.age, 0), self.num_tokens)


class RoundedLinear(nn.Module):
    """A linear layer on rounded inputs, with rounded weights; on exact ones for the tokens that are kept."""

    def __init__(
        self, linear: nn.Module, bits: int, round_input: Callable[[Tensor], Tensor], ages: BlockAges | None
    ) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.linear, self.round_input, self.ages = linear, round_input, ages
        self.weight = round_rows(linear.weight.detach(), bits)

    def forward(self, x: Tensor) -> Tensor:
        """float[batch, seq, in] -> float[batch, seq, out]."""
        out = F.linear(self.round_input(x), self.weight, self.linear.bias)
        first = self.ages.num_in_sinks if self.ages is not None else 0
        if first:
            out[:, :first] = self.linear(x[:, :first])
        return out


class RoundedCache(nn.Module):
    """A layer's projection to queries, keys and values, of which what goes into the cache is rounded.

    Keys are rotated for that as they are stored, and back, because attention will rotate them again.
    """

    def __init__(
        self, projection: nn.Module, num_heads: int, bits: int, ages: BlockAges, keeps_sinks: bool
    ) -> None:
        super().__init__()
        self.projection, self.num_heads, self.bits = projection, num_heads, bits
        self.ages, self.keeps_sinks = ages, keeps_sinks

    def forward(self, x: Tensor) -> Tensor:
        """float[batch, seq, hidden] -> float[batch, seq, 3 * hidden], interleaved per head."""
        parts: Tensor = self.projection(x).unflatten(-1, (self.num_heads, 3, -1))
        first = self.ages.num_in_sinks if self.keeps_sinks else 0
        cos, sin = self.ages.angles
        key, value = parts[..., 1, :], parts[..., 2, :]
        key = apply_rotary(round_rows_between_ends(apply_rotary(key, cos, sin), self.bits), cos, -sin)
        parts[:, first:, :, 1] = key[:, first:]
        parts[:, first:, :, 2] = round_rows_between_ends(value, self.bits)[:, first:]
        return parts.flatten(2)


class QuantizedModel:
    """A model under a scheme; shares the weights of the original, which stays as it is.

    Args:
        model: in float32 or float64: half precision would round more than is asked for.
        scheme: what is quantised.
        num_slots: of sinks, at the front of each stream.
        keeps_sinks: whether these slots stay in full precision.
        largest: of the scheme ``static``, the greatest input of each linear layer by name.
    """

    def __init__(
        self,
        model: GPTNeoX,
        scheme: Scheme,
        num_slots: int,
        keeps_sinks: bool,
        largest: Mapping[str, float] | None = None,
    ) -> None:
        self.model = sharing_copy(model)
        self.ages = BlockAges(self.model, num_slots)
        for name in linear_names(model):
            layer = self.model.get_submodule(name)
            if scheme.kind != "cache":
                round_input = _input_rounding(scheme, name, largest)
                kept = self.ages if keeps_sinks else None
                self.model.set_submodule(name, RoundedLinear(layer, scheme.bits, round_input, kept))
            elif name.endswith("query_key_value"):
                heads = model.config.network.num_attention_heads
                rounded = RoundedCache(layer, heads, scheme.bits, self.ages, keeps_sinks)
                self.model.set_submodule(name, rounded)

    def losses(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Loss of each next token as ``stream_loss`` gives it: int64[batch, seq] -> float[batch, seq - 1]."""
        self.ages.restart()
        return stream_loss(self.model, tokens, layout.sinks, layout.window)


def _input_rounding(
    scheme: Scheme, name: str, largest: Mapping[str, float] | None
) -> Callable[[Tensor], Tensor]:
    if scheme.kind == "token":
        return partial(round_rows, bits=scheme.bits)
    assert largest is not None, "static scales come from calibration"
    return partial(round_to_range, largest=largest[name], bits=scheme.bits)


def sharing_copy(model: GPTNeoX) -> GPTNeoX:
    """A model whose layers can be exchanged and hooked, on the same weights."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    copied: GPTNeoX = copy.deepcopy(model, shared)
    return copied


def linear_names(model: GPTNeoX) -> list[str]:
    """Full names of the layers that W8A8 quantises."""
    num_layers = len(model.gpt_neox.layers)
    return [f"gpt_neox.layers.{index}.{name}" for index in range(num_layers) for name in LINEAR_NAMES]


# -- calibration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """The greatest input of each linear layer by name: in the slots of sinks, and elsewhere."""

    in_sinks: dict[str, float]
    elsewhere: dict[str, float]

    def largest(self, with_sinks: bool) -> dict[str, float]:
        if not with_sinks:
            return self.elsewhere
        return {name: max(value, self.in_sinks[name]) for name, value in self.elsewhere.items()}


@torch.no_grad()
def calibrate(model: GPTNeoX, tokens: Tensor, layout: Layout, num_slots: int) -> Calibration:
    """Feed streams, int64[batch, seq], and note the greatest inputs.

    Args:
        num_slots: of sinks, at the front of each stream; there must be more tokens.
    """
    watched = sharing_copy(model)
    ages = BlockAges(watched, num_slots)
    found: dict[str, Tensor] = {name: model.embed_out.weight.new_zeros(2) for name in linear_names(model)}

    def watch(name: str, linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        sizes, first = inputs[0].abs().amax(dim=(0, 2)), ages.num_in_sinks  # sizes: [seq]
        for index, part in enumerate((sizes[:first], sizes[first:])):
            if len(part):
                found[name][index].clamp_(min=part.max())

    for name in found:
        watched.get_submodule(name).register_forward_pre_hook(partial(watch, name))
    for _ in march(watched, tokens.to(model.device), layout, None):
        pass
    both = {name: largest.tolist() for name, largest in found.items()}
    return Calibration({name: pair[0] for name, pair in both.items()}, {n: p[1] for n, p in both.items()})
