"""The network as training calls it: the loss from inside, activations kept or computed again."""

from __future__ import annotations

import pytest
import torch
from oracles import random_tokens, tiny_model

from sinktrain.data.windows import IGNORED
from sinktrain.model.loss import token_losses
from sinktrain.model.neox import GPTNeoX


def inputs_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = random_tokens(3, 20), random_tokens(3, 20, seed=1)
    targets[0, 4:9] = IGNORED
    targets[2] = IGNORED
    return tokens, targets


def gradients(model: GPTNeoX, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_network_given_targets_returns_the_sum_of_their_losses(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype).requires_grad_(True)
    inputs, targets = inputs_and_targets()
    found, expected = model(inputs, targets), token_losses(model(inputs), targets).sum()
    assert (found.dtype, found.shape) == (dtype, ())
    torch.testing.assert_close(found, expected)
    found_gradients, expected_gradients = gradients(model, found), gradients(model, expected)
    assert found_gradients.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found_gradients, expected_gradients)


def test_no_targets_no_loss() -> None:
    model = tiny_model().requires_grad_(True)
    inputs, targets = inputs_and_targets()
    loss = model(inputs, torch.full_like(targets, IGNORED))
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


def test_under_autocast_products_are_bfloat16_and_the_loss_is_float32() -> None:
    model = tiny_model(dtype=torch.float32).requires_grad_(True)
    inputs, targets = inputs_and_targets()
    expected = model(inputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(inputs, targets)
        assert model(inputs).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert 0 < abs(found.item() / expected.item() - 1) < 2e-2
    assert {gradient.dtype for gradient in gradients(model, found).values()} == {torch.float32}


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("is_parallel", [True, False])
def test_activations_computed_again_change_neither_loss_nor_gradients(
    is_autocast: bool, is_parallel: bool
) -> None:
    model = tiny_model(dtype=torch.float32, use_parallel_residual=is_parallel).requires_grad_(True)
    inputs, targets = inputs_and_targets()
    found = []
    for recompute in (False, True):
        model.recomputes_activations = recompute
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            loss = model(inputs, targets)
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_activations_of_layers_are_not_kept_when_they_are_computed_again() -> None:
    inputs, targets = inputs_and_targets()
    kept = []
    for recompute in (False, True):
        sizes: list[int] = []
        model = tiny_model(num_hidden_layers=6).requires_grad_(True)
        model.recomputes_activations = recompute

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(inputs, targets)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 5


def test_nothing_is_recomputed_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinktrain.model import neox

    monkeypatch.setattr(neox, "checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    model = tiny_model()
    model.recomputes_activations = True
    with torch.no_grad():
        assert model(*inputs_and_targets()).isfinite()
