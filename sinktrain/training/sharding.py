"""What sharding strategies share: a step of their own, and one file of whole tensors that all ranks read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from lightning.pytorch.strategies import Strategy

from sinktrain.training.step import Stepper

if TYPE_CHECKING:
    from sinktrain.model.neox import GPTNeoX
    from sinktrain.training.module import Pretraining

GATHERED = frozenset({"state_dict", "optimizer_states"})
"""Keys of a checkpoint under which a sharding strategy puts what it has gathered."""


class ShardingStrategy(Strategy):
    """Leaves each rank its part of optimizer, gradients or weights.

    Checkpoints are single files of whole tensors, in the layout of a run on one device: any strategy, on
    any number of devices, continues from them. What is under ``GATHERED`` in them are copies on the CPU
    of rank 0, which nothing else holds.
    """

    stepper: type[Stepper]
    stage: int
    """What is in shards, as ZeRO counts: 1 the optimizer, 2 gradients too, 3 weights too."""

    gathers_layers = False
    """Whether a layer's weights are gathered when it computes: then layers are compiled one by one."""

    def check(self, module: Pretraining) -> None:
        """Refuse settings that the strategy cannot serve, before a run starts."""

    def shard(self, network: GPTNeoX) -> None:
        """Leave each rank its part of the weights, where that is done before the optimizer is made."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """What is in the file; its tensors stay on disk until a rank takes its shards of them."""
        checkpoint: dict[str, Any] = torch.load(
            checkpoint_path, map_location="cpu", weights_only=True, mmap=True
        )
        return checkpoint

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True


def is_sharded(strategy: Strategy | None) -> TypeGuard[ShardingStrategy]:
    """Whether no rank holds all of optimizer, gradients and weights."""
    return isinstance(strategy, ShardingStrategy)
