"""The band by Triton's kernels: what exact evaluation on CUDA attends with, and its loss.

Tile sizes were chosen on an H100 80GB with Pythia-160m's shape, bfloat16, 1+1023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sinktrain.model.neox import GPTNeoX
from sinktrain.model.rotary import rotary_angles
from sinktrain.model.sinks.base import NullSlot
from sinktrain.streaming import band_kernels
from sinktrain.streaming.layout import Layout

BLOCK_TOKENS = 32768
"""Tokens of all rows that are fed at once: enough that launching kernels costs nothing."""
BLOCK_T = 64
LOSS_SHARED_BYTES = 3 * (128 + 256) * 64 * 2


class FusedBand:
    """A ring of keys and values per layer, long enough for a window and a block, and the sinks beside it."""

    def __init__(
        self, model: GPTNeoX, layout: Layout, batch_size: int, stream_len: int, block_size: int | None = None
    ) -> None:
        network, device = model.config.network, model.device
        self.model, self.layout = model, layout
        self.age, self.num_tokens = 0, 0
        self.num_heads, self.head_dim = network.num_attention_heads, network.head_dim
        self.half = network.rotary_ndims // 2
        is_wide = model.dtype == torch.float32
        self.block_m, self.block_n = (64, 32) if is_wide or self.head_dim > 128 else (128, 64)
        self.block_size = min(block_size or max(1, BLOCK_TOKENS // batch_size), stream_len)
        self.window = min(layout.window, stream_len)
        tokens = min(self.window - 1 + self.block_size, stream_len)
        self.ring_size = triton.cdiv(tokens + self.block_n, self.block_n) * self.block_n
        self.sink_slots = max(16, triton.next_power_of_2(layout.sinks))  # what a matrix product takes
        rows = (network.num_hidden_layers, batch_size, self.num_heads)
        self.ring_keys = torch.zeros(*rows, self.ring_size, self.head_dim, dtype=model.dtype, device=device)
        self.ring_values = torch.zeros_like(self.ring_keys)
        self.sink_keys = torch.zeros(*rows, self.sink_slots, self.head_dim, dtype=model.dtype, device=device)
        self.sink_values = torch.zeros_like(self.sink_keys)
        self.nulls: dict[int, NullSlot] = {}

    def begin(self, num_tokens: int) -> None:
        assert num_tokens <= self.block_size, "the ring is too short for the block"
        self.age, self.num_tokens = self.age + self.num_tokens, num_tokens
        ages = torch.arange(self.age, self.age + num_tokens, device=self.model.device)
        self.at_ring = self._angles(ages)
        self.at_sinks = self._angles(ages.clamp(max=self.layout.num_slots - 1))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        assert q.stride() == k.stride() == v.stride()
        assert q.stride(-1) == 1
        batch, heads, seq, head_dim = q.shape
        strides = (*q.stride()[:3], heads)
        num_sinks, ring_size = self.layout.sinks, self.ring_size
        keys, values = self.ring_keys[layer], self.ring_values[layer]
        sink_keys, sink_values = self.sink_keys[layer], self.sink_values[layer]
        sizes = {
            "SINK_SLOTS": self.sink_slots,
            "HALF": self.half,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        }
        band_kernels.keep_keys[(triton.cdiv(seq, BLOCK_T), batch * heads)](
            k, v, self.at_ring, keys, values, sink_keys, sink_values, self.age, seq,
            *strides, num_sinks, ring_size, **sizes, BLOCK_T=BLOCK_T,
        )  # fmt: skip
        out = torch.empty(batch, seq, heads, head_dim, dtype=q.dtype, device=q.device)
        band_kernels.band_attention[(triton.cdiv(seq, self.block_m), batch * heads)](
            q, self.at_ring, self.at_sinks, keys, values, sink_keys, sink_values,
            *self._in_front(layer, null), out, self.age, seq, head_dim**-0.5,
            *strides, num_sinks, self.window, ring_size, HAS_SINKS=num_sinks > 0, HAS_NULL=null is not None,
            **sizes, BLOCK_M=self.block_m, BLOCK_N=self.block_n, PRECISION=precision(q.dtype),
            num_warps=4 if head_dim <= 64 else 8, num_stages=3,
        )  # fmt: skip
        return out.transpose(1, 2)

    def _in_front(self, layer: int, null: NullSlot | None) -> NullSlot:
        """A layer's null slot as the kernel reads it, the same for all blocks."""
        if layer not in self.nulls:
            self.nulls[layer] = (null or NullSlot()).in_float32().in_front(self.model.rotary_steps)
        return self.nulls[layer]

    def _angles(self, ages: Tensor) -> Tensor:
        """float32[token, cos or sin, HALF]."""
        angles = rotary_angles(ages, self.model.rotary_steps, torch.float32)
        return torch.stack([part[:, : self.half] for part in angles], dim=1).contiguous()


def fused_losses(model: GPTNeoX, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target in nats: float[rows, hidden], int64[rows] -> float32[rows]. Keeps no logits."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    if not len(targets):
        return losses
    weight = model.embed_out.weight
    block_m, block_n, block_k = _loss_tiles(hidden)
    band_kernels.linear_loss[(triton.cdiv(len(targets), block_m),)](
        hidden.contiguous(), weight, targets.contiguous(), losses, len(targets), len(weight),
        WIDTH=weight.shape[1], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION=precision(hidden.dtype), num_warps=8, num_stages=3,
    )  # fmt: skip
    return losses


def _loss_tiles(hidden: Tensor) -> tuple[int, int, int]:
    """Rows, entries and columns that fit into a multiprocessor's shared memory, three times."""
    if hidden.element_size() > 2:
        return 32, 32, 32
    if hidden.device.type == "cuda":
        device: Any = torch.cuda.get_device_properties(hidden.device)
        if device.shared_memory_per_block_optin < LOSS_SHARED_BYTES:
            return 128, 64, 32
    return 128, 256, 64


def precision(dtype: torch.dtype) -> str:
    """How the tensor cores multiply: float32 is not shortened to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
