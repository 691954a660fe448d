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
    """Whether it can only be ORG/NAME or ORG/NAME@REVISION: a mistyped path (``runs/…``, or in a folder that
    exists) never is.
    """
    repo_id = source.partition("@")[0]
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", repo_id) or source.endswith(_FILE_ENDINGS):
        return False
    first = repo_id.split("/")[0]
    return first != "runs" and not Path(first).exists()


def at_revision(source: str, revision: str | None) -> str:
    """The MODEL that ``--revision`` makes of one: ORG/NAME@REVISION, or itself without it.

    Raises:
        ModelError: it is a path, or names a revision already.
    """
    if revision is None:
        return source
    if not is_hub_id(source):
        raise ModelError(f"--revision {revision} is for Hub ids and {source} is none; leave it out")
    if "@" in source:
        raise ModelError(f"{source} names a revision already; leave out --revision {revision}")
    return f"{source}@{revision}"


@lru_cache
def download(source: str, revision: str | None = None) -> Path:
    """Fetch a model, its safetensors if it has any, once per process; of code it fetches nothing.

    Args:
        source: ``ORG/NAME``, or ``ORG/NAME@REVISION``.
        revision: branch, tag or commit, where ``source`` names none.

    Returns:
        The folder of the snapshot.

    Raises:
        ModelError: the Hub has it not, does not give it, or cannot be reached; or it is no model.
    """
    folder = snapshot(source, [*_CONFIG, *_SAFETENSORS, PREFIX_FILE], ModelError, revision)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source} holds no model: there is no config.json; mend the name or the revision")
    if not any(folder.glob("model*.safetensors")):
        snapshot(source, _PICKLED, ModelError, revision)
    return folder
