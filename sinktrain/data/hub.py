"""Snapshots of Hugging Face repositories, fetched into the Hub's own cache; a refusal is one line."""

from __future__ import annotations

import errno
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinktrain.errors import SinktrainError, first_line

_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)  # less than git allows
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def snapshot(
    source: str, files: list[str], refusal: type[SinktrainError], revision: str | None = None
) -> Path:
    """Fetch the files that match these patterns; ``HF_HUB_OFFLINE`` is honoured.

    Args:
        source: ``ORG/NAME``, or ``ORG/NAME@REVISION``.
        files: patterns of their names.
        refusal: what is raised.
        revision: branch, tag or commit, where ``source`` names none.

    Returns:
        The folder of the snapshot.

    Raises:
        SinktrainError: a ``refusal``: that is no name, and nothing was asked; or the Hub has it not, does
            not give it, or cannot be reached, or it cannot be stored.
    """
    from huggingface_hub import snapshot_download

    repo_id, revision = _checked(source, revision, refusal)
    try:
        with _quiet_client():
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # errors of its HTTP library, another one in each release, come through
        raise refusal(f"{repo_id} {_problem(error, revision)}") from error


def may_be_revision(name: str) -> bool:
    """Whether this could name a branch, tag or commit: no option, no path out of a folder, no query."""
    return _REVISION.fullmatch(name) is not None


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep back what the client says of its tries and of the disk; its logs, unless another level is set."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if level == logging.WARNING:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    finally:
        logger.setLevel(level)


def _checked(source: str, revision: str | None, refusal: type[SinktrainError]) -> tuple[str, str | None]:
    """The repository and its revision; what is no name of one leaves this machine in no request."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

    repo_id, at, typed = source.partition("@")
    if at and revision is not None:
        raise refusal(f"{source} names a revision, and {revision} is another; leave one of them out")
    revision = typed if at else revision
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise refusal(
            f"{repo_id} is neither here nor a name on the Hub; use letters, digits, -, _ and ., at most 96, "
            "no -- or .. and none of -, . at an end"
        ) from None
    if revision is not None and not may_be_revision(revision):
        raise refusal(
            f"{repo_id}: {revision!r} is no revision; name a branch, tag or commit, such as step1000"
        )
    return repo_id, revision


def unsigned_line(error: BaseException) -> str:
    """What an error says, less the queries of addresses: those of large files are signed by them."""
    return re.sub(r"\?[^\s']*", "", first_line(error))


def _problem(error: Exception, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Where only part of it is in the cache, or there is no network, the client wraps what happened in advice.
    plainer = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    if isinstance(plainer, GatedRepoError):
        return "is gated; ask for access on its Hub page, then log in: hf auth login"
    if isinstance(plainer, RepositoryNotFoundError):
        return "is neither here nor on the Hub; mend the name, or log in if it is private: hf auth login"
    if isinstance(plainer, RevisionNotFoundError):
        return f"has no revision {revision} on the Hub; use one of its branches, tags or commits"
    reason = unsigned_line(plainer)
    if isinstance(plainer, OfflineModeIsEnabled):
        return (
            "is not here, not all of it is in the Hub's cache, and offline mode is on; unset HF_HUB_OFFLINE"
        )
    if isinstance(plainer, HfHubHTTPError):
        status = plainer.response.status_code
        if status == 401:
            return "is not given: the Hub does not know the token; log in again: hf auth login"
        if status == 429 or status >= 500:
            return f"is not given: the Hub answers {status}; try again later"
    elif isinstance(plainer, OSError) and plainer.errno in _FULL:
        return f"cannot be stored in the Hub's cache: {reason}; make room, or set HF_HOME to another disk"
    elif isinstance(error, LocalEntryNotFoundError) and plainer is not error:
        return f"is not here, not all of it is in the Hub's cache, and the Hub cannot be reached: {reason}"
    return f"is not here, and the Hub does not give it: {reason}"
