"""Other ways to train the same network, for ``sinktrain bench train --peers``.

Each is written as its users run it, on CUDA compiled, and each starts from our initial weights, so that
its first losses must be ours. The optimizer step around them is ``PeerTraining``'s in
``sinktrain.experiments.peer_training``.

Axes: batch, head, seq, head_dim, hidden, vocab.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinktrain.errors import SinktrainError
from sinktrain.model.config import ModelConfig, NetworkConfig
from sinktrain.model.devices import compute_dtype
from sinktrain.model.rotary import apply_rotary, phase_steps, rotary_angles
from sinktrain.model.transformers_format import to_transformers_config

LITGPT_COMMAND = "pip install --no-deps litgpt==0.5.13 psutil"


class TrainingPeer(ABC):
    """A network of the same sizes and weights, and its loss.

    Args:
        config: of our network, which must be vanilla.
        weights: its state dict.
        device: where it trains; on CUDA it is compiled.

    Attributes:
        name: of its row.
        note: what a reader of the row must know.
        network: what is trained.
    """

    name: ClassVar[str]
    note: ClassVar[str]
    network: nn.Module

    @abstractmethod
    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> None: ...

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float[], of int64[batch, seq] each."""


class PlainPeer(TrainingPeer):
    """Our network in plain torch: rotation and loss left to torch.compile, all logits at once."""

    name = "plain torch"
    note = "torch.nn alone, on CUDA one compiled graph: all logits, SDPA as torch chooses it"

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> None:
        with torch.device(device):
            self.network = PlainNeoX(config.network, config.vocab_size)
        self.network.load_state_dict(weights)
        if device.type == "cuda":
            self.network.compile(dynamic=False)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.network(inputs, targets)
        return loss


class TransformersPeer(TrainingPeer):
    """transformers' GPTNeoXForCausalLM with the loss that it brings."""

    name = "transformers"
    note = "GPTNeoXForCausalLM, sdpa, its own loss, on CUDA one compiled graph"

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> None:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        settings = to_transformers_config(config, bos_token_id=None, eos_token_id=None)
        with torch.device(device):
            self.network = GPTNeoXForCausalLM(GPTNeoXConfig(**settings, attn_implementation="sdpa"))
        named = {"lm_head.weight" if name == "embed_out.weight" else name: w for name, w in weights.items()}
        self.network.load_state_dict(named)
        self.network.train()
        if device.type == "cuda":
            self.network.compile(dynamic=False)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.contiguous()
        output = self.network(inputs, labels=targets, shift_labels=targets, use_cache=False)
        loss: Tensor = output.loss
        return loss


class LitGPTPeer(TrainingPeer):
    """litgpt as its ``pretrain`` runs it.

    It is spared what Fabric adds there: a float32 copy of all logits, and waiting for the norm.
    """

    name = "litgpt"
    note = "GPT, on CUDA compiled, and its chunked_cross_entropy, not compiled, as its pretrain has them"

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> None:
        if find_spec("litgpt") is None:
            raise SinktrainError(f"skipped: litgpt is not installed; {LITGPT_COMMAND}")
        sizes = litgpt_config(config)
        renamed: dict[str, Tensor] = {}
        import_module("litgpt.scripts.convert_hf_checkpoint").copy_weights_gpt_neox(sizes, renamed, weights)
        with torch.device(device):
            self.network = import_module("litgpt.model").GPT(sizes)
        self.network.load_state_dict(renamed)
        self._forward: Any = torch.compile(self.network) if device.type == "cuda" else self.network
        self._loss: Any = import_module("litgpt.utils").chunked_cross_entropy

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._loss(self._forward(inputs), targets.contiguous())
        return loss


PEERS: tuple[type[TrainingPeer], ...] = (PlainPeer, TransformersPeer, LitGPTPeer)


def litgpt_config(config: ModelConfig) -> Any:
    """litgpt's settings for a network of these sizes; for a Pythia they are those that litgpt ships."""
    network = config.network
    return import_module("litgpt.config").Config(
        block_size=network.max_position_embeddings,
        padded_vocab_size=config.vocab_size,
        n_layer=network.num_hidden_layers,
        n_head=network.num_attention_heads,
        n_embd=network.hidden_size,
        intermediate_size=network.intermediate_size,
        rotary_percentage=network.rotary_pct,
        rope_base=int(network.rotary_emb_base),
        parallel_residual=network.use_parallel_residual,
        norm_eps=network.layer_norm_eps,
    )


# -- our network in plain torch -------------------------------------------------------------------


class PlainNeoX(nn.Module):
    """GPT-NeoX with parallel residuals under our parameters' names, by torch's own operations alone."""

    def __init__(self, config: NetworkConfig, vocab_size: int) -> None:
        super().__init__()
        steps = phase_steps(config.rotary_ndims, config.rotary_emb_base)
        positions = torch.arange(config.max_position_embeddings, device=steps.device)
        cos, sin = rotary_angles(positions, steps, torch.float32)
        self.cos: Tensor
        self.sin: Tensor
        device = torch.get_default_device()
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)
        self.gpt_neox = nn.ModuleDict(
            {
                "embed_in": nn.Embedding(vocab_size, config.hidden_size),
                "layers": nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers)),
                "final_layer_norm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            }
        )
        self.embed_out = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, float[], of int64[batch, seq] each."""
        cos, sin = self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]]
        hidden = self.gpt_neox["embed_in"](inputs)
        hidden = hidden.to(compute_dtype(hidden))  # as ours: autocast would leave the residuals in float32
        for layer in cast(nn.ModuleList, self.gpt_neox["layers"]):
            hidden = layer(hidden, cos, sin)
        logits = self.embed_out(self.gpt_neox["final_layer_norm"](hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainLayer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.input_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": nn.Linear(width, config.intermediate_size),
                "dense_4h_to_h": nn.Linear(config.intermediate_size, width),
            }
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """float[batch, seq, hidden], and float32[seq, rotary_ndims] twice -> float[batch, seq, hidden]."""
        fused = self.attention["query_key_value"](self.input_layernorm(hidden))
        q, k, v = fused.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        attended = self.attention["dense"](mixed)
        wide = F.gelu(self.mlp["dense_h_to_4h"](self.post_attention_layernorm(hidden)))
        mixed_in: Tensor = hidden + attended + self.mlp["dense_4h_to_h"](wide)
        return mixed_in
