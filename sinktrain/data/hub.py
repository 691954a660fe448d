"""Snapshots of Hugging Face repositories, fetched into the Hub's own cache; a refusal is one line."""

from __future__ import annotations

from pathlib import Path

from sinktrain.errors import SinktrainError, first_line


def snapshot(
    repo_id: str, files: list[str], refusal: type[SinktrainError], revision: str | None = None
) -> Path:
    """Fetch the files that match these patterns; ``HF_HUB_OFFLINE`` is honoured.

    Returns:
        The folder of the snapshot.

    Raises:
        SinktrainError: a ``refusal``: the Hub has it not, does not give it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # errors of its HTTP library, another one in each release, come through
        raise refusal(f"{repo_id} {_problem(error, revision)}") from error


def _problem(error: Exception, revision: str | None) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "is gated; ask for access on its Hub page, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "is neither here nor on the Hub; mend the name, or log in if it is private: hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision} on the Hub; use one of its branches, tags or commits"
    plainer = error.__cause__ or error  # offline, the client wraps it in advice
    return f"is not here, and the Hub does not give it: {first_line(plainer)}"
