"""Models of the Hugging Face Hub: which names are theirs, and what is fetched of them."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from sinktrain.data.hub import snapshot
from sinktrain.errors import ModelError
from sinktrain.model.transformers_format import PREFIX_FILE

_CONFIG = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
_FILE_ENDINGS = (".ckpt", ".safetensors", ".bin", ".json")


def is_hub_id(source: str) -> bool:
    """Whether it can only be ORG/NAME: a mistyped path (``runs/…``, or in a folder that exists) never is."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", source) or source.endswith(_FILE_ENDINGS):
        return False
    first = source.split("/")[0]
    return first != "runs" and not Path(first).exists()


@lru_cache
def download(repo_id: str, revision: str | None) -> Path:
    """Fetch a model, its safetensors if it has any, once per process.

    Returns:
        The folder of the snapshot.

    Raises:
        ModelError: the Hub has it not, does not give it, or cannot be reached.
    """
    folder = snapshot(repo_id, [*_CONFIG, *_SAFETENSORS, PREFIX_FILE], ModelError, revision)
    if not any(folder.glob("model*.safetensors")):
        snapshot(repo_id, _PICKLED, ModelError, revision)
    return folder
