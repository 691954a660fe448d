"""What a recipe may say, and what its run is called."""

from __future__ import annotations

from sinktrain.errors import ConfigError
from sinktrain.model.config import SinkConfig


def check_recipe(
    learning_rate: float,
    min_lr_ratio: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    clip_norm: float,
) -> None:
    """Refuse numbers that no training can use.

    Raises:
        ConfigError: says which, and what would do.
    """
    problems = {
        f"model.learning_rate is {learning_rate}; use more than 0": learning_rate > 0,
        f"model.min_lr_ratio is {min_lr_ratio}; use 0 to 1": 0 <= min_lr_ratio <= 1,
        f"model.weight_decay is {weight_decay}; use 0 or more": weight_decay >= 0,
        f"model.betas are {list(betas)}; use two of 0 or more, below 1": all(0 <= beta < 1 for beta in betas),
        f"model.eps is {eps}; use 0 or more": eps >= 0,
        f"model.clip_norm is {clip_norm}; use more than 0": clip_norm > 0,
    }
    found = [problem for problem, is_good in problems.items() if not is_good]
    if found:
        raise ConfigError("; ".join(found))


def check_skipping(spike_sigma: float | None, max_skipped_steps: int) -> None:
    """The same of when steps are skipped; raises ConfigError."""
    if spike_sigma is not None and spike_sigma <= 0:
        raise ConfigError(f"model.spike_sigma is {spike_sigma}; use more than 0, or null to skip no spikes")
    if max_skipped_steps < 1:
        raise ConfigError(f"model.max_skipped_steps is {max_skipped_steps}; use 1 or more")


def arm_name(sink: SinkConfig, window: int | None = None, mask_documents: bool = False) -> str:
    """``vanilla``, ``token``, ``token-2``, ``zero-window-128``, ``token-documents``: what arms differ in."""
    parts = ["vanilla" if sink.kind == "none" else sink.kind]
    parts += [str(sink.count)] * (sink.count > 1)
    parts += [] if window is None else [f"window-{window}"]
    parts += ["documents"] * mask_documents
    return "-".join(parts)
