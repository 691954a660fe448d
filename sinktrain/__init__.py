"""sinktrain: pretrain GPT-NeoX models with or without an attention sink, stream them, compare them.

Names are imported when first used, so that ``import sinktrain`` is instant and needs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "SinktrainError": "sinktrain.errors",
    "ConfigError": "sinktrain.errors",
    "DataError": "sinktrain.errors",
    "ModelError": "sinktrain.errors",
    "TrainingError": "sinktrain.errors",
    "StreamError": "sinktrain.errors",
    "ExportError": "sinktrain.errors",
    "load_model": "sinktrain.model.checkpoints",
    "StreamingDecoder": "sinktrain.streaming.decoder",
    "stream_logits": "sinktrain.streaming.blockwise",
    "stream_loss": "sinktrain.streaming.blockwise",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sinktrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
