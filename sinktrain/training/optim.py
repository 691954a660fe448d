"""AdamW with Pythia's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Everything decays except LayerNorm parameters and biases, as in EleutherAI/gpt-neox
    ``megatron/model/utils.py`` (``get_params_for_weight_decay_optimization``): embeddings decay,
    the sink's row with them.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    spared = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``, in one fused kernel: only that clips and skips."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
