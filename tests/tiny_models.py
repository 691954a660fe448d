"""Tiny models with weights large enough that every part of the network shows in the logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sinktrain.model.checkpoints import CHECKPOINT_KEY, FORMAT_VERSION, NETWORK_PREFIX
from sinktrain.model.config import ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.init import SINK_PART
from sinktrain.model.neox import GPTNeoX

TINY = NetworkConfig(32, 2, 2, vocab_size=97, max_position_embeddings=64)
FACTS = {"tokens_seen": 6400, "samples_consumed": 100, "seed": 7, "arm": "sink", "data_fingerprint": "f00d"}


def tiny_model(
    network: NetworkConfig = TINY, sink: SinkConfig | None = None, seed: int = 0, **changes: Any
) -> GPTNeoX:
    """A model with seeded random weights, also in the LayerNorms and biases."""
    model = GPTNeoX(ModelConfig(replace(network, **changes), sink or SinkConfig()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 1.0 if SINK_PART in name else 0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


def write_checkpoint(model: GPTNeoX, path: Path, facts: Mapping[str, Any] = FACTS) -> Path:
    """What training writes, optimizer and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"format_version": FORMAT_VERSION, "model": model.config.to_dict(), **facts}
    weights = {NETWORK_PREFIX + name: weight for name, weight in model.state_dict().items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}}
    torch.save(
        {"state_dict": weights, "global_step": 3, CHECKPOINT_KEY: known, "optimizer_states": [optimizer]},
        path,
    )
    return path


def write_run(model: GPTNeoX, folder: Path) -> Path:
    write_checkpoint(model, folder / "checkpoints" / "last.ckpt")
    return folder


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if key not in remove}))


def random_tokens(vocab_size: int, batch: int = 2, seq: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
