"""What sharding strategies share: one file of whole tensors, written by rank 0 and read by every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy


class WholeCheckpoints(Strategy):
    """Checkpoints in the layout of one device: a strategy gathers whole tensors for them, and shards them."""

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
