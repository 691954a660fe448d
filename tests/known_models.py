"""Models built so that what attention does, and what it costs to lose the sink, is known by arithmetic."""

from __future__ import annotations

import dataclasses
import math

import torch
from oracles import TINY, VOCAB

from sinktrain.model.config import ModelConfig, SinkConfig
from sinktrain.model.neox import GPTNeoX

RARE = 0
"""The token that a ``sink_seeker`` without its sink expects too often; keep it out of the text."""

FAINT = 1e-3
"""What all embeddings hold besides in 24 of 32 dimensions, so that no median is 0."""

LOSS_WITH_SINK = math.log(VOCAB)
LOSS_WITHOUT_SINK = math.log(VOCAB - 1 + math.exp(1 / math.sqrt((4 + 24 * FAINT**2) / 32 + 1e-5)))


def sink_seeker(sinks: tuple[int, ...] = (90,), length: int = 64, **sizes: int) -> GPTNeoX:
    """One layer whose heads put all weight on the sinks that they see, evenly, and otherwise on all text.

    All text tokens look alike and positions do not matter. A sink's value is 0, so with a sink all next
    tokens are equally likely; text has the value 1, which moves the hidden state towards ``RARE``.
    """
    network = dataclasses.replace(
        TINY, num_hidden_layers=1, rotary_pct=0.0, max_position_embeddings=length, **sizes
    )
    sink = SinkConfig("token", len(sinks), sinks) if sinks else SinkConfig()
    model = GPTNeoX(ModelConfig(network, sink)).double()
    scale = math.sqrt(
        (2 + 24 * FAINT**2) / 32 + network.layer_norm_eps
    )  # what LayerNorm divides these embeddings by
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        embedding = model.gpt_neox.embed_in.weight
        embedding[:, 8::2], embedding[:, 9::2] = FAINT, -FAINT
        embedding[:, 0], embedding[:, 1] = 1, -1
        embedding[list(sinks), :2] = 0
        embedding[list(sinks), 5], embedding[list(sinks), 6] = 1, -1
        attention = model.gpt_neox.layers[0].attention
        fused = attention.query_key_value
        weight = fused.weight.view(network.num_attention_heads, 3, network.head_dim, network.hidden_size)
        bias = fused.bias.view(network.num_attention_heads, 3, network.head_dim)
        bias[:, 0, 0] = math.sqrt(network.head_dim)
        weight[:, 1, 0, 5] = 1000
        weight[:, 2, 0, 0] = scale
        attention.dense.weight[2, 0], attention.dense.weight[3, 0] = 1, -1
        model.embed_out.weight[RARE, 2] = 1
    return model.eval().requires_grad_(False)
