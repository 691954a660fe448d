"""The GPT-NeoX network, with transformers' parameter names: one file for every arm and every use.

Axes: batch, seq, head, head_dim, hidden, vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sinktrain.model.attention import Attend, CausalAttention
from sinktrain.model.config import ModelConfig, NetworkConfig
from sinktrain.model.devices import compute_dtype, has_fast_path
from sinktrain.model.loss import summed_loss
from sinktrain.model.rotary import phase_steps
from sinktrain.model.sinks.base import KINDS, NullSlot

if TYPE_CHECKING:
    from sinktrain.model.masked_attention import Mask


class GPTNeoX(nn.Module):
    """A causal language model: int64 tokens in, logits for each next token out.

    ``config`` holds its sizes and its sink; ``sink_ids`` are the tokens that a stream of it starts
    with (empty for vanilla). Tokens are taken as given: no sink is added here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputes_activations = False
        """Whether a layer's activations are computed again in the backward pass instead of kept."""
        self.mask: Mask | None = None
        """What ``forward`` lets a token see, where that is less than all before it: a matter of training."""
        self.rotary_steps: Tensor
        steps = phase_steps(config.network.rotary_ndims, config.network.rotary_emb_base)
        self.register_buffer("rotary_steps", steps, persistent=False)
        self.gpt_neox = Backbone(config)
        self.embed_out = nn.Linear(config.network.hidden_size, config.vocab_size, bias=False)

    @property
    def sink_ids(self) -> list[int]:
        return list(self.config.sink.token_ids)

    @property
    def device(self) -> torch.device:
        return self.embed_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_out.weight.dtype

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Dense causal logits: int64[batch, seq] -> float[batch, seq, vocab].

        With targets, int64[batch, seq], their ``summed_loss`` instead.
        """
        hidden = self.hidden(tokens, self._attend(tokens))
        return self.logits(hidden) if targets is None else summed_loss(hidden, self.embed_out.weight, targets)

    def _attend(self, tokens: Tensor) -> Attend:
        if self.mask is None:
            return CausalAttention(self.rotary_steps, tokens.shape[1], self.dtype)
        from sinktrain.model.masked_attention import MaskedAttention

        return MaskedAttention(self, tokens, self.mask)

    def hidden(self, tokens: Tensor, attend: Attend) -> Tensor:
        """States before the head: int64[batch, seq] -> float[batch, seq, hidden]."""
        hidden = self.gpt_neox.embed_in(tokens)
        hidden = hidden.to(compute_dtype(hidden))
        recompute = self.recomputes_activations and torch.is_grad_enabled()
        for index, layer in enumerate(self.gpt_neox.layers):
            if recompute:
                hidden = checkpoint(layer, hidden, index, attend, use_reentrant=False)
            else:
                hidden = layer(hidden, index, attend)
        states: Tensor = self.gpt_neox.final_layer_norm(hidden)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """float[…, hidden] -> float[…, vocab]."""
        logits: Tensor = self.embed_out(hidden)
        return logits


class Backbone(nn.Module):
    """Embedding, layers and last norm, under the names of transformers' ``GPTNeoXModel``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        network = config.network
        self.embed_in = nn.Embedding(config.vocab_size, network.hidden_size)
        self.layers = nn.ModuleList(
            Layer(network, config.sink.kind) for _ in range(network.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(network.hidden_size, eps=network.layer_norm_eps)


class Layer(nn.Module):
    """Attention and MLP, side by side (Pythia) or one after the other, each with its own LayerNorm."""

    def __init__(self, config: NetworkConfig, sink_kind: str) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, sink_kind)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, index: int, attend: Attend) -> Tensor:
        attended = self.attention(self.input_layernorm(hidden), index, attend) + hidden
        mlp_input = hidden if self.use_parallel_residual else attended
        mixed: Tensor = self.mlp(self.post_attention_layernorm(mlp_input)) + attended
        return mixed


class Attention(nn.Module):
    """Fused query, key and value, interleaved per head: [head, 3 * head_dim]; and what the sink adds."""

    def __init__(self, config: NetworkConfig, sink_kind: str) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        self.sink = KINDS[sink_kind](width, self.num_heads)
        self.query_key_value = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.dense = nn.Linear(width, width, bias=config.attention_bias)

    def forward(self, hidden: Tensor, index: int, attend: Attend) -> Tensor:
        null = self.sink.null_slot()
        mixed = self._mixed_at_once(hidden, attend, null)
        if mixed is None:
            fused = self.query_key_value(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            q, k, v = fused.chunk(3, dim=-1)  # each [batch, head, seq, head_dim]
            mixed = attend(index, q, k, v, null).transpose(1, 2).flatten(-2)
        projected: Tensor = self.dense(self._scaled(mixed, hidden))
        return projected

    def _mixed_at_once(self, hidden: Tensor, attend: Attend, null: NullSlot | None) -> Tensor | None:
        if not isinstance(attend, CausalAttention):
            return None
        return attend.from_input(hidden, self.query_key_value, self.num_heads, null)

    def _scaled(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        scale = self.sink.output_scale(hidden)
        if scale is None:
            return mixed
        heads = mixed.view(*scale.shape, -1)
        return (heads * scale.unsqueeze(-1)).view_as(mixed)


class MLP(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = _ACTIVATION[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.activation is F.gelu and has_fast_path(hidden):
            return self._fused(hidden)
        narrowed: Tensor = self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden)))
        return narrowed

    def _fused(self, hidden: Tensor) -> Tensor:
        from sinktrain.model.fused_mlp import gelu_mlp

        up, down = self.dense_h_to_4h, self.dense_4h_to_h
        hidden = hidden.to(compute_dtype(hidden))
        narrowed: Tensor = gelu_mlp(hidden, up.weight, up.bias, down.weight)[0]
        return narrowed + down.bias.to(narrowed.dtype)  # the compiler adds it on the way


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}
