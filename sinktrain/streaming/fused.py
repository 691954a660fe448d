"""One decoding step by the kernels of ``sinktrain.streaming.kernels``: what a CUDA graph replays.

Three kernels a layer: both LayerNorms with the query-key-value product, the MLP's first and the gates of
heads; the attention; and both products that return to the residual. With several rows the products run on the
tensor cores, where the LayerNorms are a kernel of their own.

Tile sizes were chosen on an H100 80GB with Pythia's shapes, bfloat16, 1+1023; rows 1 and 32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn

from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.places import null_slots
from sinktrain.model.sinks.base import NullSlot
from sinktrain.streaming import kernels
from sinktrain.streaming.ring import RingCache

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
SPLIT_K = 1024
"""Columns of the MLP's second product that one program takes, where there are several rows."""


class FusedStep:
    """Feeds one token to every stream of a cache. Its buffers are its own; weights and cache are shared.

    Args:
        model: in float32, float16 or bfloat16; its null slots are read now, all other weights at every call.
            Its sink kind scales the heads' output by its ``output_gate`` if at all.
        cache: whose rows get a token each.
        tokens: int64[batch], read at every call.
        use_pdl: let each kernel begin while its predecessor runs (compute capability 9 and later).
    """

    def __init__(self, model: GPTNeoX, cache: RingCache, tokens: Tensor, use_pdl: bool) -> None:
        network, rows = model.config.network, cache.batch_size
        assert network.intermediate_size is not None
        self.model, self.cache, self.tokens, self.rows = model, cache, tokens, rows
        self.width, self.inner = network.hidden_size, network.intermediate_size
        self.num_heads, self.head_dim = network.num_attention_heads, network.head_dim
        self.half, self.eps = network.rotary_ndims // 2, network.layer_norm_eps
        self.activation = ACTIVATIONS[network.hidden_act]
        self.launch: dict[str, Any] = {"PDL": use_pdl, **({"launch_pdl": True} if use_pdl else {})}
        self._split_slots()
        self.nulls = [
            None if null is None else null.in_float32().in_front(model.rotary_steps)
            for null in null_slots(model)
        ]

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        inner_dtype = torch.float32 if rows == 1 else model.dtype  # what the tensor cores take
        self.step_ages = buffer(rows, dtype=torch.int64)
        self.angles = buffer(rows, 4, max(1, self.half))
        self.hidden, self.qkv = buffer(rows, self.width), buffer(rows, 3 * self.width)
        self.gates = buffer(rows, self.num_heads)
        self.normed_a, self.normed_b = (buffer(rows, self.width, dtype=model.dtype) for _ in range(2))
        self.mixed = buffer(rows, self.width, dtype=inner_dtype)
        self.wide = buffer(rows, self.inner, dtype=inner_dtype)
        self.logits = buffer(rows, model.config.vocab_size, dtype=model.dtype)
        # What programs leave for the one that ends last, and how many have.
        streams = rows * self.num_heads
        self.partial_mixes = buffer(streams * self.splits, self.head_dim)
        self.partial_stats = buffer(streams * self.splits, 2)
        self.partial_sums = buffer(1 + triton.cdiv(self.inner, SPLIT_K), rows, self.width)
        self.arrivals = buffer(max(streams, rows * self.width), dtype=torch.int32)

    def __call__(self) -> Tensor:
        """Feed ``tokens``; returns logits, dtype[batch, vocab], in a buffer that the next call overwrites.

        The rows age on the device alone: the cache's bounds are the caller's to shift.
        """
        self._begin()
        backbone = self.model.gpt_neox
        for index, layer in enumerate(backbone.layers):
            assert isinstance(layer, Layer)
            self._layer(index, layer)
        self._norm_linear((backbone.final_layer_norm, self.model.embed_out, self.logits, "none"))
        return self.logits

    def _layer(self, index: int, layer: Layer) -> None:
        attention, mlp, gate = layer.attention, layer.mlp, layer.attention.sink.output_gate()
        fused = (layer.input_layernorm, attention.query_key_value, self.qkv, "none")
        up = (layer.post_attention_layernorm, mlp.dense_h_to_4h, self.wide, self.activation)
        if layer.use_parallel_residual:
            self._norm_linear(fused, up, gate)
            self._attend(index, gate is not None)
            self._residual_linear((self.mixed, attention.dense), (self.wide, mlp.dense_4h_to_h))
        else:
            self._norm_linear(fused, gate=gate)
            self._attend(index, gate is not None)
            self._residual_linear((self.mixed, attention.dense))
            self._norm_linear(up)
            self._residual_linear((self.wide, mlp.dense_4h_to_h))

    def _begin(self) -> None:
        cache = self.cache
        kernels.begin_step[(self.rows,)](
            self.tokens,
            cache.age,
            cache.start_pos,
            self.model.gpt_neox.embed_in.weight,
            self.model.rotary_steps,
            cache.tokens,
            self.hidden,
            self.step_ages,
            self.angles,
            self.model.config.vocab_size,
            **self._layout(),
            HIDDEN=self.width,
            HALF=self.half,
            BLOCK_H=triton.next_power_of_2(self.width),
            BLOCK_R=triton.next_power_of_2(max(1, self.half)),
            PDL=self.launch["PDL"],
        )

    def _split_slots(self) -> None:
        """Share the slots among programs, each of which takes them tile by tile."""
        self.block_d = max(16, triton.next_power_of_2(self.head_dim))
        if self.rows > 1:
            self.block_slots, most_programs = 16, 1536
        else:
            self.block_slots, most_programs = 32 if self.block_d <= 64 else 64, 768
        num_tiles = triton.cdiv(self.cache.num_slots, self.block_slots)
        splits = min(num_tiles, triton.cdiv(most_programs, self.rows * self.num_heads))
        self.tiles = triton.cdiv(num_tiles, splits)
        self.splits = triton.cdiv(num_tiles, self.tiles)

    def _attend(self, index: int, is_gated: bool) -> None:
        null = self.nulls[index]
        kernels.ring_attend[(self.splits, self.num_heads, self.rows)](
            self.qkv,
            self.angles,
            self.step_ages,
            self.cache.keys[index],
            self.cache.values[index],
            *(null or NullSlot()),
            self.gates if is_gated else None,
            self.partial_mixes,
            self.partial_stats,
            self.arrivals,
            self.mixed,
            self.head_dim**-0.5,
            HAS_NULL=null is not None,
            **self._layout(),
            HEADS=self.num_heads,
            HEAD_DIM=self.head_dim,
            HALF=self.half,
            BLOCK_S=self.block_slots,
            BLOCK_D=self.block_d,
            TILES=self.tiles,
            SPLITS=self.splits,
            BLOCK_SPLITS=triton.next_power_of_2(self.splits),
            num_warps=_num_warps(self.block_slots * self.block_d, 4096),
            **self.launch,
        )

    def _layout(self) -> dict[str, int]:
        layout = self.cache.layout
        return {"SINKS": layout.sinks, "WINDOW": layout.window, "RING": self.cache.ring_size}

    def _norm_linear(
        self, a: _NormLinear, b: _NormLinear | None = None, gate: nn.Linear | None = None
    ) -> None:
        """out = activation(linear(norm(hidden))), of one or of two at once; the gates take the norm of a."""
        norm_a, linear_a, out_a, activation_a = a
        norm_b, linear_b, out_b, activation_b = b or (None, None, None, "none")
        norms = (_weights(norm_a), _weights(norm_b))
        weights = (_weights(linear_a), _weights(linear_b))
        gates = (*_weights(gate), None if gate is None else self.gates)
        sizes = [0 if out is None else out.shape[1] for out in (out_a, out_b, gates[-1])]
        constants = {
            **dict(zip(("N_A", "N_B", "N_GATES"), sizes, strict=True)),
            "K": self.width,
            "ACTIVATION_A": activation_a,
            "ACTIVATION_B": activation_b,
            **self.launch,
        }
        block_k = triton.next_power_of_2(self.width)
        if self.rows == 1:
            block_n = max(1, 4096 // block_k)
            kernels.norm_matvec[(sum(triton.cdiv(n, block_n) for n in sizes),)](
                self.hidden,
                *norms[0],
                *weights[0],
                out_a,
                *norms[1],
                *weights[1],
                out_b,
                *gates,
                self.eps,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                num_warps=_num_warps(block_n * block_k, 4096),
                **constants,
            )
            return
        normed_b = None if b is None else self.normed_b
        kernels.norm_rows[(self.rows,)](
            self.hidden,
            *norms[0],
            self.normed_a,
            *norms[1],
            normed_b,
            self.eps,
            K=self.width,
            HAS_B=b is not None,
            BLOCK_K=block_k,
            **self.launch,
        )
        tile = self._matrix_tile(64 if sizes[0] > 16 * self.width else 32)
        tiles = sum(triton.cdiv(n, tile["BLOCK_N"]) for n in sizes)
        kernels.matmul[(tiles, triton.cdiv(self.rows, tile["BLOCK_M"]))](
            self.rows,
            self.normed_a,
            *weights[0],
            out_a,
            normed_b,
            *weights[1],
            out_b,
            *gates,
            **tile,
            **constants,
        )

    def _residual_linear(self, a: _Linear, b: _Linear | None = None) -> None:
        """hidden += linear(x), of one or of two at once."""
        x_a, linear_a = a
        x_b, linear_b = b or (None, None)
        arguments = (x_a, *_weights(linear_a), x_b, *_weights(linear_b))
        k_a, k_b = x_a.shape[1], 0 if x_b is None else x_b.shape[1]
        constants = {"N": self.width, "K_A": k_a, "K_B": k_b, **self.launch}
        if self.rows == 1:
            block_n, block_a, block_b = 2, triton.next_power_of_2(k_a), triton.next_power_of_2(max(1, k_b))
            kernels.residual_matvec[(triton.cdiv(self.width, block_n),)](
                self.hidden,
                *arguments,
                BLOCK_N=block_n,
                BLOCK_A=block_a,
                BLOCK_B=block_b,
                num_warps=_num_warps(block_n * (block_a + block_b), 8192),
                **constants,
            )
            return
        tile, splits_b = self._matrix_tile(32), triton.cdiv(k_b, SPLIT_K)
        grid = (
            triton.cdiv(self.width, tile["BLOCK_N"]),
            1 + splits_b,
            triton.cdiv(self.rows, tile["BLOCK_M"]),
        )
        kernels.residual_matmul[grid](
            self.hidden,
            self.rows,
            *arguments,
            self.partial_sums,
            self.arrivals,
            SPLITS_B=splits_b,
            SPLIT_K=SPLIT_K,
            **tile,
            **constants,
        )

    def _matrix_tile(self, block_n: int) -> dict[str, int]:
        return {
            "BLOCK_M": max(16, min(64, triton.next_power_of_2(self.rows))),
            "BLOCK_N": block_n,
            "BLOCK_K": 256 // self.model.dtype.itemsize,
            "num_warps": 4,
            "num_stages": 5 if block_n <= 32 else 4,
        }


_NormLinear = tuple[nn.LayerNorm, nn.Linear, Tensor, str]
_Linear = tuple[Tensor, nn.Linear]


def _weights(module: nn.LayerNorm | nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if module is None else (module.weight, module.bias)


def _num_warps(elements: int, elements_per_warp: int) -> int:
    warps: int = triton.next_power_of_2(elements) // elements_per_warp
    return max(1, min(16, warps))
