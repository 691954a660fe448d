"""Pythia's initialisation, drawn in a fixed order from one seed, alike in every arm.

Source: EleutherAI/gpt-neox ``megatron/model/init_functions.py`` (small_init_init_method and
wang_init_method), as ``models/*/*.yml`` of EleutherAI/pythia choose them. transformers' default
(normal, 0.02) is another one, and so is litgpt's (EleutherAI/pythia issue 129).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sinktrain.model.config import NetworkConfig
from sinktrain.model.neox import GPTNeoX


def small_init_std(config: NetworkConfig) -> float:
    """For embedding, head, query_key_value and dense_h_to_4h."""
    return math.sqrt(2 / (5 * config.hidden_size))


def wang_init_std(config: NetworkConfig) -> float:
    """For what writes into the residual stream: attention.dense and dense_4h_to_h."""
    return 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))


@torch.no_grad()
def initialize(model: GPTNeoX, seed: int) -> None:
    """Draw all parameters of ``model`` in place; the same seed gives the same values on any device."""
    config = model.config.network
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
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
