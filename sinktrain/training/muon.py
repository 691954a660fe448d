"""Muon for the matrices of the layers, AdamW for everything else: one optimizer, as the Trainer expects.

Muon steps in the direction of the momentum with all its singular values brought near 1, found by
matrix products alone. Its learning rate is scaled so that a step changes a matrix as much as AdamW's
would, in the root mean square; so AdamW's learning rate and weight decay carry over.

Sources: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io,
2024); Moonshot, "Muon is Scalable for LLM Training" (arXiv 2502.16982), equation 4. ``torch.optim.Muon``
computes the same, one matrix after the other; here matrices of one shape go through each product together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sinktrain.model.neox import GPTNeoX
from sinktrain.training.optim import parameter_groups

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that every singular value goes through: steep at 0, and in the end near 1 (0.7 to 1.2)."""

ITERATIONS = 5
RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's steps before the learning rate, as Moonshot found it."""

SMALLEST_NORM = 1e-7


def muon(
    network: GPTNeoX, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> Muon:
    """Muon over the matrices of the layers; embedding, head, LayerNorms and biases stay with AdamW."""
    return Muon(muon_groups(network, weight_decay), learning_rate, betas, eps)


def muon_groups(network: GPTNeoX, weight_decay: float) -> list[dict[str, Any]]:
    """Fused query, key and value; the layers' other matrices; and what is left of ``parameter_groups``.

    A group with ``momentum`` is Muon's. In one with ``num_heads`` each matrix is three, for query, key and
    value, and each of them is made orthogonal by itself: together they would share one spectrum, and the
    values, whose gradients are the largest, would leave little of it to queries and keys. (Jordan's post
    found three better than one.) They are rows of the fused matrix, interleaved by head.
    """
    layers = network.gpt_neox.layers
    matrices = {name: p for name, p in layers.named_parameters() if p.requires_grad and p.dim() == 2}
    fused = [p for name, p in matrices.items() if name.endswith("query_key_value.weight")]
    others = [p for name, p in matrices.items() if not name.endswith("query_key_value.weight")]
    ours = {id(p) for p in matrices.values()}
    common = {"weight_decay": weight_decay, "momentum": MOMENTUM}
    rest = [
        group | {"params": [p for p in group["params"] if id(p) not in ours]}
        for group in parameter_groups(network, weight_decay)
    ]
    num_heads = network.config.network.num_attention_heads
    return [{"params": fused, "num_heads": num_heads, **common}, {"params": others, **common}, *rest]


class Muon(torch.optim.Optimizer):
    """One step of Muon or AdamW for each group; like fused AdamW it clips and skips on the device.

    Set before ``step``: ``grad_scale`` (float32[], gradients are divided by it) and ``found_inf``
    (float32[], 1 leaves weights and state as they are). Every rank of a DDP run does the whole of it.

    Args:
        groups: as ``muon_groups`` gives them.
        dtype: of the products that make a step orthogonal.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "fused": True,  # only that clips and skips
            "momentum": None,
            "num_heads": None,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if group["momentum"] is None:
                self._step_adamw(trained, group)
            else:
                for _, alike in groupby(sorted(trained, key=_shape), key=_shape):
                    self._step_muon(list(alike), group)
        return loss

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._adamw_state(p) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adamw_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step all matrices of one shape; stacks are float[matrix, row, column]."""
        gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        skip = gradient.new_zeros(()) if self.found_inf is None else self.found_inf
        gradient = gradient.masked_fill(skip > 0, 0.0)  # not even a NaN may come through
        momenta = [self._momentum(p) for p in parameters]
        known = torch.stack(momenta)
        momentum = torch.where(skip > 0, known, known.lerp(gradient, 1 - group["momentum"]))
        step = self._direction(gradient.lerp(momentum, group["momentum"]), group["num_heads"])
        rate = group["lr"] * (1 - skip)
        torch._foreach_copy_(momenta, momentum.unbind())
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(parameters, (rate * step).unbind())

    def _momentum(self, parameter: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _direction(self, stack: Tensor, num_heads: int | None) -> Tensor:
        """What to subtract, times the learning rate: float[matrix, row, column], in the stack's dtype."""
        if num_heads is None:
            return self._as_large_as_adamws(stack)
        matrices, rows, columns = stack.shape
        by_head = stack.view(matrices, num_heads, 3, rows // (3 * num_heads), columns).transpose(1, 2)
        apart = by_head.reshape(3 * matrices, rows // 3, columns)  # queries, keys and values
        together = self._as_large_as_adamws(apart).view(by_head.shape).transpose(1, 2)
        return together.reshape(stack.shape)

    def _as_large_as_adamws(self, stack: Tensor) -> Tensor:
        """Orthogonal rows or columns, with the root mean square of AdamW's steps."""
        scale = RMS_OF_ADAMW * math.sqrt(max(stack.shape[1:]))
        return orthogonalized(stack, self.dtype).to(stack.dtype) * scale


def orthogonalized(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix with its singular values brought near 1, by Newton-Schulz iterations.

    Args:
        stack: float[matrix, row, column].
        dtype: computed in, and returned.
    """
    is_tall = stack.shape[1] > stack.shape[2]
    wide = stack.mT if is_tall else stack
    norms: Tensor = torch.linalg.matrix_norm(wide, keepdim=True)  # of Frobenius: no singular value exceeds it
    x: Tensor = (wide / norms.clamp(min=SMALLEST_NORM)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _shape(parameter: Tensor) -> list[int]:
    return list(parameter.shape)
