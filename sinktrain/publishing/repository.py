"""Repositories of the Hub as publishing needs them: what is there, and one commit more, or one line why not.

Every error of the client becomes a ``PublishError`` that says what to do. The token is read as the Hub's own
tools read it, goes into requests alone, and is struck from whatever an error says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinktrain.errors import PublishError
from sinktrain.files import sha256_file
from sinktrain.publishing.refusals import explanation

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

ATTRIBUTES = ".gitattributes"
"""The Hub's own file, which says what is stored as large; it is never ours to change."""


def read_token() -> str:
    """The token that the Hub's own tools would use.

    Raises:
        PublishError: there is none, or it can't be one.
    """
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # a token that is refreshed over the network
        raise PublishError(
            f"the token cannot be read ({type(error).__name__}); log in again: hf auth login"
        ) from None
    if not token:
        raise PublishError("there is no token for the Hub; log in with: hf auth login, or set HF_TOKEN")
    if not re.fullmatch(r"[!-~]+", token):
        raise PublishError("the token holds characters that no token has; log in again: hf auth login")
    return token


# -- what is on the Hub ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteState:
    """A repository as it is: the commits that its branches and tags point to."""

    is_private: bool
    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class LocalFile:
    """A file to publish."""

    path: Path

    @cached_property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def has_id(self, remote_id: str) -> bool:
        """Whether the Hub's file of this id is equal: sha256 names a large one, git's sha1 a small one."""
        return remote_id == (self._sha256 if len(remote_id) == 64 else self._git_id)

    @cached_property
    def _sha256(self) -> str:
        return sha256_file(self.path)

    @cached_property
    def _git_id(self) -> str:
        blob = b"blob %d\0" % self.num_bytes + self.path.read_bytes()
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def local_files(folder: Path) -> dict[str, LocalFile]:
    """All files of a folder by their path in the repository, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): LocalFile(path) for path in paths}


def changed(files: Mapping[str, LocalFile], there: Mapping[str, str]) -> list[str]:
    """The files whose content is not what the Hub has, by its ids."""
    return [name for name, file in files.items() if name not in there or not file.has_id(there[name])]


@dataclass(frozen=True)
class Hub:
    """The Hub at one endpoint, for the owner of one token."""

    endpoint: str
    token: str = field(repr=False)

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token, library_name="sinktrain")

    def check_may_write(self, namespace: str) -> None:
        """Raise PublishError unless the token is known and may write for this user or organization."""
        with self._told(namespace):
            me = self._api.whoami()
        roles = {me["name"]: "write"} | {org["name"]: org.get("roleInOrg") for org in me.get("orgs", ())}
        if namespace not in roles:
            known = ", ".join(sorted(roles))
            raise PublishError(
                f"the token may not publish for {namespace}; it is known for {known}: use one of those"
            )
        token_role = me.get("auth", {}).get("accessToken", {}).get("role")
        if "read" in (token_role, roles[namespace]):
            raise PublishError(
                f"the token may only read for {namespace}; use one with the permission to write "
                f"({self.endpoint}/settings/tokens): hf auth login"
            )

    def state(self, repo_id: str) -> RemoteState | None:
        """What the repository is, or None where there is none yet."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self._told(repo_id):
            try:
                info = self._api.model_info(repo_id)
                refs = self._api.list_repo_refs(repo_id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None
        if info.id != repo_id:
            raise PublishError(f"{repo_id} is called {info.id} now; write --repo-id {info.id}")
        return RemoteState(
            bool(info.private),
            {branch.name: branch.target_commit for branch in refs.branches},
            {tag.name: tag.target_commit for tag in refs.tags},
        )

    def file_ids(self, repo_id: str, commit: str) -> dict[str, str]:
        """The files of a commit: the sha256 of a large one, git's id of a small one."""
        from huggingface_hub import RepoFile

        with self._told(repo_id):
            tree = list(self._api.list_repo_tree(repo_id, recursive=True, revision=commit))
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in tree
            if isinstance(entry, RepoFile)
        }

    def read_json(self, repo_id: str, commit: str, path: str, folder: Path) -> dict[str, Any]:
        """A file of a commit, fetched into ``folder``; empty where it is no JSON object."""
        with self._told(repo_id), _without_bars():
            file = self._api.hf_hub_download(repo_id, path, revision=commit, local_dir=folder)
        try:
            value = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    # -- changes -----------------------------------------------------------------------------------

    def create_repo(self, repo_id: str, is_private: bool) -> None:
        """Make the repository, unless it is there."""
        with self._told(repo_id):
            self._api.create_repo(repo_id, private=is_private or None, exist_ok=True)

    def upload(self, repo_id: str, files: Mapping[str, LocalFile]) -> list[CommitOperationAdd]:
        """Send what is stored as large, and not there yet; no branch shows it before ``commit``."""
        from huggingface_hub import CommitOperationAdd

        with self._told(repo_id):
            additions = [CommitOperationAdd(name, file.path) for name, file in files.items()]
            self._api.preupload_lfs_files(repo_id, additions, free_memory=False)
        ignored = [one.path_in_repo for one in additions if getattr(one, "_should_ignore", False)]
        if ignored:  # which a commit would leave out without a word
            raise PublishError(
                f"{repo_id} would leave out {ignored[0]}, as its .gitignore asks; "
                "remove that file, and try again"
            )
        return additions

    def create_branch(self, repo_id: str, branch: str) -> str:
        """Make a branch at the repository's first commit, which holds no model.

        Returns:
            That commit.
        """
        with self._told(repo_id):
            first: str = self._api.list_repo_commits(repo_id)[-1].commit_id
            self._api.create_branch(repo_id, branch=branch, revision=first, exist_ok=True)
        return first

    def commit(
        self,
        repo_id: str,
        branch: str,
        parent: str,
        uploaded: Iterable[CommitOperationAdd],
        removed: Iterable[str],
        message: str,
    ) -> str:
        """Move a branch from ``parent`` to one commit more; its large files have been uploaded.

        Returns:
            The commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name, is_folder=False) for name in removed
        ]
        for sent in uploaded:  # what the client knows of them is of another branch
            operation = CommitOperationAdd(sent.path_in_repo, sent.path_or_fileobj)
            operation.upload_info = sent.upload_info
            operations.append(operation)
        with self._told(repo_id):
            made = self._api.create_commit(
                repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
            )
        return made.oid

    def create_tag(self, repo_id: str, tag: str, commit: str) -> None:
        with self._told(repo_id):
            self._api.create_tag(repo_id, tag=tag, revision=commit)

    def collect(self, title: str, namespace: str, is_private: bool, repo_ids: Iterable[str]) -> str:
        """Put models into the collection of this title, made if need be.

        Returns:
            Its URL.
        """
        with self._told(f"the collection {title}"):
            collection = self._api.create_collection(
                title, namespace=namespace, private=is_private, exists_ok=True
            )
            for repo_id in repo_ids:
                self._api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
        return f"{self.endpoint}/collections/{collection.slug}"

    @contextmanager
    def _told(self, subject: str) -> Iterator[None]:
        """Whatever goes wrong becomes one line; the client's own warnings of tries before it don't show."""
        logger = logging.getLogger("huggingface_hub")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        except PublishError:
            raise
        except Exception as error:  # errors of its HTTP library, another one in each release, come through
            told = explanation(error, subject, self.endpoint)
            raise PublishError(told.replace(self.token, "…")) from None
        finally:
            logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            enable_progress_bars()
