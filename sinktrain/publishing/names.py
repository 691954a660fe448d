"""Names that a publication is given, checked before anything is asked of the Hub."""

from __future__ import annotations

import re

from sinktrain.data.hub import may_be_revision
from sinktrain.errors import PublishError

MAIN = "main"

_NO_NEW_REF = re.compile(r"\.$|\.lock(/|$)|^refs/|^[0-9a-f]{40}$")
"""Of what may be read as a revision: what git refuses, or reads as something else."""


def check_repo_id(option: str, repo_id: str) -> None:
    """Raise PublishError unless the Hub allows this ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if repo_id.count("/") != 1:
        raise PublishError(
            f"{option} {repo_id} is not ORG/NAME; write your user or organization, then the name"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise PublishError(
            f"{option} {repo_id} is no name on the Hub; use letters, digits, -, _ and ., at most 96, "
            "no -- or .. and none of -, . at an end"
        ) from None


def check_ref(option: str, name: str) -> None:
    """Raise PublishError unless git and the Hub allow this name of a branch or tag."""
    if not may_be_revision(name) or _NO_NEW_REF.search(name):
        raise PublishError(
            f'{option} "{name}" is no name of a branch or tag; use letters, digits, -, _ and ., such as v1.0'
        )


def chosen_endpoint(typed: str | None) -> str:
    """The URL of ``--endpoint``, else what HF_ENDPOINT says, else the Hub's.

    Raises:
        PublishError: it is no URL.
    """
    from huggingface_hub import constants

    endpoint = (typed or constants.ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", endpoint):
        raise PublishError(f"--endpoint {endpoint} is no URL; write it like https://huggingface.co")
    return endpoint
