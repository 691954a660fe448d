"""What a network starts with: Pythia's initialisation, or another model's weights.

Pythia's is drawn in a fixed order from one seed, alike in every arm. Source: EleutherAI/gpt-neox
``megatron/model/init_functions.py`` (small_init_init_method and wang_init_method), as ``models/*/*.yml``
of EleutherAI/pythia choose them. transformers' default (normal, 0.02) is another one, and so is litgpt's
(EleutherAI/pythia issue 129).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sinktrain.model.config import NetworkConfig
from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.sinks.base import KINDS

SINK_PART = ".attention.sink."
"""In the names of what a sink adds to the layers."""

SINK_STREAM = 0x53494E4B
"""What a seed is XORed with for what sinks add: by itself it would give them the embedding's values."""


def small_init_std(config: NetworkConfig) -> float:
    """For embedding, head, query_key_value and dense_h_to_4h."""
    return math.sqrt(2 / (5 * config.hidden_size))


def wang_init_std(config: NetworkConfig) -> float:
    """For what writes into the residual stream: attention.dense and dense_4h_to_h."""
    return 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))


@torch.no_grad()
def initialize(model: GPTNeoX, seed: int) -> None:
    """Draw all parameters of ``model`` in place; the same seed gives the same values on any device.

    What a sink adds to the layers is drawn apart, so that all kinds share the other values.
    """
    config = model.config.network
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if SINK_PART in name:
            continue
        if "layer_norm" in name or "layernorm" in name:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            is_residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            std = wang_init_std(config) if is_residual else small_init_std(config)
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            drawn.normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)
    _initialize_sinks(model, seed)


@torch.no_grad()
def _initialize_sinks(model: GPTNeoX, seed: int) -> None:
    network, generator = model.config.network, torch.Generator().manual_seed(seed ^ SINK_STREAM)
    kind = KINDS[model.config.sink.kind]
    for layer in model.gpt_neox.layers:
        assert isinstance(layer, Layer)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # a linear layer draws by itself
            drawn = kind(network.hidden_size, network.num_attention_heads)
        drawn.initialize(generator, small_init_std(network))
        layer.attention.sink.load_state_dict(drawn.state_dict())


@torch.no_grad()
def continue_from(model: GPTNeoX, source: GPTNeoX, seed: int) -> None:
    """Give ``model``, in place, the weights of ``source``, of the same sizes; new sinks start afresh.

    A row that no text uses has decayed to nothing (Pythia's padding), and LayerNorm makes magnified noise of
    that; so the embedding of each sink that ``source`` was not trained with is drawn as ``initialize``
    draws it. The head keeps its rows: a sink is never predicted. What another kind added to the layers goes.
    """
    _initialize_sinks(model, seed)
    own = model.state_dict()
    model.load_state_dict(own | {name: value for name, value in source.state_dict().items() if name in own})
    new = [sink for sink in model.sink_ids if sink not in source.sink_ids]
    drawn = torch.empty(len(new), model.config.network.hidden_size, dtype=torch.float32, device="cpu")
    drawn.normal_(0.0, small_init_std(model.config.network), generator=torch.Generator().manual_seed(seed))
    embedding = model.gpt_neox.embed_in.weight
    embedding[new] = drawn.to(embedding)
