"""``@every_kind``: a test that holds for models of all sink kinds, and of two sink tokens."""

from __future__ import annotations

from typing import Any

import pytest

from sinktrain.model.sinks.base import KINDS

MODELS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in sorted(KINDS)},
    "two tokens": {"sinks": (90, 91)},
}
"""Arguments for ``oracles.tiny_model``."""

every_kind = pytest.mark.parametrize("which", MODELS.values(), ids=MODELS)
