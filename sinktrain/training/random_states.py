"""The random states of a process, kept in checkpoints."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Those of torch, CUDA, numpy and Python, in types that a weights-only load accepts."""
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set them; those of CUDA only where there are as many devices as there were."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
