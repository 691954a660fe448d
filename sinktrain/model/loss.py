"""Next-token loss, in nats, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sinktrain.data.windows import IGNORED
from sinktrain.model.devices import compute_dtype, has_fast_path


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, in nats.

    Args:
        logits: float[batch, seq, vocab].
        targets: int64[batch, seq]; ``IGNORED`` where nothing is scored.

    Returns:
        [batch, seq] in float32 (float64 for float64 logits); 0 where the target is ``IGNORED``.
    """
    wide = logits if logits.element_size() == 8 else logits.float()
    flat = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets.shape)


def summed_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of ``token_losses`` of the logits that the head makes; on CUDA they are never there all at once.

    Args:
        hidden: float[batch, seq, hidden], after the last norm.
        head: float[vocab, hidden].
        targets: int64[batch, seq]; ``IGNORED`` where nothing is scored.

    Returns:
        float32[] (float64 in float64), in nats.
    """
    hidden = hidden.to(compute_dtype(hidden))
    if not has_fast_path(hidden):
        return token_losses(F.linear(hidden, head), targets).sum()
    from sinktrain.model.fused import linear_loss, linear_loss_and_gradients

    flat = hidden.flatten(0, -2), head, targets.flatten()
    loss: Tensor = linear_loss_and_gradients(*flat)[0] if torch.is_grad_enabled() else linear_loss(*flat)
    return loss
