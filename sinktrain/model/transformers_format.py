"""GPT-NeoX as transformers writes it: ``config.json`` and the names of weights, to ours and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from sinktrain.errors import ConfigError, ModelError
from sinktrain.model.config import PYTHIA, ModelConfig, NetworkConfig
from sinktrain.model.devices import dtype_name
from sinktrain.model.init import SINK_PART
from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.model.sinks.base import KINDS

MODEL_TYPE = "gpt_neox"

CODE_MODEL_TYPE = "sinktrain_gpt_neox"
"""Unknown to transformers, so that it never takes a model that needs ``CODE_FILE`` for a stock one."""

CODE_FILE = "modeling_sinktrain.py"
WEIGHTS_FILE = "model.safetensors"
PREFIX_FILE = "prefix_cache.safetensors"

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# Where config.json lacks one of these, transformers assumes what NetworkConfig does.
_OPTIONAL = (
    "max_position_embeddings",
    "use_parallel_residual",
    "attention_bias",
    "hidden_act",
    "layer_norm_eps",
)

_STOCK = {"architectures": ["GPTNeoXForCausalLM"], "model_type": MODEL_TYPE}

_MODULE = CODE_FILE.removesuffix(".py")
_CODE = {
    "architectures": ["SinktrainForCausalLM"],
    "model_type": CODE_MODEL_TYPE,
    "auto_map": {
        "AutoConfig": f"{_MODULE}.SinktrainConfig",
        "AutoModelForCausalLM": f"{_MODULE}.SinktrainForCausalLM",
    },
}

# Two of Pythia's Hub configs tell less than the 2048 positions that every Pythia was trained on.
_HUB_POSITIONS = {"pythia-14m": 512, "pythia-31m": 1024}

# Buffers of old checkpoints (causal mask, frequencies), which the config implies.
_BUFFER = re.compile(r"(\.attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def from_transformers_config(value: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a parsed ``config.json``; ``where`` names it in messages.

    Without a ``sink`` block the model is vanilla. ``max_position_embeddings`` is the length trained on,
    also for the Pythias whose Hub config says less.

    Raises:
        ModelError: it is not GPT-NeoX, or a GPT-NeoX with parts that this network lacks.
    """
    if value.get("model_type") not in (MODEL_TYPE, CODE_MODEL_TYPE):
        raise ModelError(
            f'{where} is of model_type "{value.get("model_type")}"; '
            f'use a GPT-NeoX model ("{MODEL_TYPE}"), such as EleutherAI/pythia-160m'
        )
    if value.get("tie_word_embeddings"):
        raise ModelError(f"{where} ties head and embedding; use a model with tie_word_embeddings false")
    missing = [name for name in _REQUIRED if name not in value]
    if missing:
        raise ModelError(f"{where} lacks {', '.join(missing)}; use a complete GPT-NeoX config")
    try:
        sizes = {name: value[name] for name in (*_REQUIRED, *_OPTIONAL) if name in value}
        network = NetworkConfig(**sizes, **_rotary(value, where))
        if "sink" not in value:
            return ModelConfig(_as_trained(network))
        return ModelConfig.from_dict({"network": asdict(network), "sink": value["sink"]})
    except (ConfigError, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{where}: {error}") from error


def to_transformers_config(
    config: ModelConfig,
    bos_token_id: int | None,
    eos_token_id: int | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The ``config.json`` of ``config`` with weights of ``dtype``, for transformers 4.57 and 5; eos pads.

    The rotary settings and the dtype stand in both their forms: 4.57 takes ``rotary_pct`` for 0.25 when it
    finds ``rope_parameters`` alone, and says nothing. ``eos_token_id`` defaults to 2 there, hence the nulls.
    """
    network = config.network
    return {
        **(_CODE if KINDS[config.sink.kind].loads_as == "code" else _STOCK),
        **asdict(network),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": network.rotary_emb_base,
            "partial_rotary_factor": network.rotary_pct,
        },
        "tie_word_embeddings": False,
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "sink": config.sink.to_dict(),
    }


def from_transformers_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the weights of a checkpoint: the head's newer name gone, and old buffers."""
    return {
        "embed_out.weight" if name == "lm_head.weight" else name: weight
        for name, weight in weights.items()
        if not _BUFFER.search(name)
    }


def to_transformers_weights(model: GPTNeoX) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a folder that transformers loads, by the file's name.

    The weights are those of the network; where it loads with a prefix cache, what the sinks add is a file of
    its own: ``keys`` and ``values``, float[layer, 1, head, 1, head_dim], for a cache of transformers, and the
    parameters that they come from, for ``load_model``.
    """
    weights = model.state_dict()
    if KINDS[model.config.sink.kind].loads_as != "prefix":
        return {WEIGHTS_FILE: weights}
    sinks = {name: weight for name, weight in weights.items() if SINK_PART in name}
    stock = {name: weight for name, weight in weights.items() if name not in sinks}
    return {WEIGHTS_FILE: stock, PREFIX_FILE: _prefix_cache(model) | sinks}


def _prefix_cache(model: GPTNeoX) -> dict[str, Tensor]:
    """A key as it is unrotated stands at position 0, and the text behind it starts at 1."""
    network, slots = model.config.network, []
    nothing = model.embed_out.weight.new_zeros(network.num_attention_heads, network.head_dim)
    for layer in model.gpt_neox.layers:
        assert isinstance(layer, Layer)
        null = layer.attention.sink.null_slot()
        assert null is not None, "a kind that loads as a prefix has a null slot"
        assert null.score is None, "a cache has no place for a score"
        slots.append([nothing if part is None else part for part in (null.key, null.value)])
    keys, values = (torch.stack(parts)[:, None, :, None] for parts in zip(*slots, strict=True))
    return {"keys": keys, "values": values}


def _rotary(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """transformers 5 keeps these in ``rope_parameters``, 4 at the top level; the first wins there too."""
    rope = value.get("rope_scaling") or value.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ModelError(f'{where} scales its rotary positions ("{rope_type}"); use a model that does not')
    return {
        "rotary_pct": rope.get("partial_rotary_factor", value.get("rotary_pct", 0.25)),
        "rotary_emb_base": rope.get("rope_theta", value.get("rotary_emb_base", 10000.0)),
    }


def _as_trained(network: NetworkConfig) -> NetworkConfig:
    """The preset itself for a Pythia whose Hub config tells too few positions; any other network as it is."""
    for name, positions in _HUB_POSITIONS.items():
        if network == replace(PYTHIA[name], max_position_embeddings=positions):
            return PYTHIA[name]
    return network
