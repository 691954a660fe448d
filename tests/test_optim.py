"""AdamW's groups are Pythia's: matrices and embeddings decay, LayerNorms and biases do not."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from sinktrain.model.config import SinkConfig
from sinktrain.training.optim import adamw, parameter_groups


def _names(sink: SinkConfig | None = None) -> tuple[set[str], set[str]]:
    model = tiny_model(sink=sink).requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    return {names[id(p)] for p in decayed["params"]}, {names[id(p)] for p in spared["params"]}


def test_embeddings_and_matrices_decay_and_the_rest_does_not() -> None:
    decayed, spared = _names()
    assert {"gpt_neox.embed_in.weight", "embed_out.weight"} <= decayed
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert all("norm" in name or name.endswith("bias") for name in spared)
    assert len(decayed) == 2 + 2 * 4
    assert len(spared) == 2 + 2 * (4 + 4)
    assert not decayed & spared


def test_both_arms_have_the_same_groups() -> None:
    assert _names(SinkConfig("token", 1, (96,))) == _names()


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_model().requires_grad_(True)
    model.embed_out.requires_grad_(False)
    parameters = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert not any(p is model.embed_out.weight for p in parameters)


def test_optimizer_is_one_fused_kernel_with_the_settings() -> None:
    optimizer = adamw(tiny_model().requires_grad_(True), 1e-3, 0.1, (0.9, 0.95), 1e-8)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, weight_decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert group["fused"]
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.95), 1e-8)
        assert group["weight_decay"] == weight_decay


def test_fused_step_equals_adamw_by_hand() -> None:
    """Decoupled decay: the weight shrinks by lr x decay before Adam's own step."""
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    optimizer = adamw(model, 0.01, 0.5, (0.9, 0.95), 1e-8)
    model(torch.ones(1, 3)).square().sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.5 if name == "weight" else 0.0
        gradient = gradients[name]
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(parameter.double(), expected, atol=1e-6)
