"""Models of the Hugging Face Hub, fetched into the Hub's own cache: config, tokenizer and weights alone."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from sinktrain.errors import ModelError

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
    """Fetch a model, its safetensors if it has any, once per process; ``HF_HUB_OFFLINE`` is honoured.

    Returns:
        The folder of the snapshot.

    Raises:
        ModelError: the Hub has it not, does not give it, or cannot be reached.
    """
    folder = _snapshot(repo_id, revision, [*_CONFIG, *_SAFETENSORS])
    if not any(folder.glob("*.safetensors")):
        _snapshot(repo_id, revision, _PICKLED)
    return folder


def _snapshot(repo_id: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        remedy = "is gated; ask for access on its Hub page, then log in: hf auth login"
        raise ModelError(f"{repo_id} {remedy}") from error
    except RepositoryNotFoundError as error:
        remedy = "mend the name, or log in if it is private: hf auth login"
        raise ModelError(f"{repo_id} is neither a folder here nor a model on the Hub; {remedy}") from error
    except RevisionNotFoundError as error:
        remedy = "use one of its branches, tags or commits"
        raise ModelError(f"{repo_id} has no revision {revision} on the Hub; {remedy}") from error
    except Exception as error:  # errors of its HTTP library, another one in each release, come through
        cause = error.__cause__ or error  # offline, the client wraps the plainer error in advice
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ModelError(f"{repo_id} is no folder here, and the Hub does not give it: {reason}") from error
