"""Next-token loss, in nats, token by token."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sinktrain.data.windows import IGNORED


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
