"""What has been measured, kept on disk piece by piece: a comparison that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinktrain.files import atomic_path, write_json


@dataclass(frozen=True)
class Store:
    """A folder of measurements, each found again only by all that it depends on.

    Args:
        folder: made when the first measurement is kept.
        identity: of the model and of how it is measured; with a measurement's own name, its key.
    """

    folder: Path
    identity: Mapping[str, Any]

    def losses(self, name: str, measure: Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
        """Per-token losses, float64[stream, token], from the disk or measured now.

        They are kept in float32, which holds all that a loss has, unless the model is float64.
        """
        path = self._path(name, "npy")
        kept_as = np.float64 if self.identity["dtype"] == "float64" else np.float32
        try:
            kept: NDArray[np.float64] = np.load(path).astype(np.float64)
            return kept
        except (OSError, ValueError, EOFError):  # not measured yet, or a damaged file
            measured = measure()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, measured.astype(kept_as))
        return measured.astype(kept_as).astype(np.float64)

    def rows(self, name: str, measure: Callable[[], Any]) -> Any:
        """Anything that JSON holds, from the disk or measured now."""
        path = self._path(name, "json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            measured = measure()
        write_json(path, measured)
        return measured

    def _path(self, name: str, suffix: str) -> Path:
        key = json.dumps([name, dict(self.identity)], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.{suffix}"
