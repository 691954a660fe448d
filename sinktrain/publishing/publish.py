"""Models to the Hub: one commit a branch, complete or not at all.

Everything is checked, and every last model exported, before anything is sent. A branch moves once, to a
commit whose large files have all arrived, so a publication that was cut off leaves what was there, and the
same command continues it: what has arrived is not sent again, and what is unchanged gets no new commit.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinktrain.errors import ExportError, PublishError, first_line
from sinktrain.progress import progress_bar
from sinktrain.publishing.branch import Branch
from sinktrain.publishing.card import CardOptions
from sinktrain.publishing.card_compared import without_paths
from sinktrain.publishing.card_results import COMPARISON_FOLDER
from sinktrain.publishing.export import export
from sinktrain.publishing.names import chosen_endpoint
from sinktrain.publishing.plan import Publication, Target, plan
from sinktrain.publishing.repository import (
    Hub,
    LocalFile,
    RemoteState,
    local_files,
    read_token,
)
from sinktrain.report.reading import read_results
from sinktrain.report.wording import Results
from sinktrain.report.write import write_report

Say = Callable[[str], None]

_FOLDERS = re.compile(r"(?<![\w.:/~])~?/[^\s\"']*/(?=[^\s\"'/])")
"""The folders of an absolute path, up to the name."""

PUBLIC_ENVIRONMENT = (
    *("sinktrain", "torch", "python", "device", "dtype", "max_tokens", "num_streams"),
    *("started_at", "elapsed_s"),
)
"""What a published comparison tells of how it was measured, besides texts and a command without paths."""


@dataclass(frozen=True)
class Published:
    """A branch that holds its model.

    Args:
        repo_id, branch: where it is.
        url: page of the branch.
        commit: what the branch points to.
        num_files, num_bytes: of the model with all that goes with it.
        is_new: whether this publication moved the branch.
    """

    repo_id: str
    branch: str
    url: str
    commit: str
    num_files: int
    num_bytes: int
    is_new: bool


@dataclass(frozen=True)
class Draft:
    """What a publication would put on a branch: the bytes of each file, and the card."""

    repo_id: str
    branch: str
    files: Mapping[str, int]
    card: str


def publish(asked: Publication, say: Say) -> tuple[list[Published], str | None]:
    """Publish every model of ``asked``.

    Args:
        asked: what to publish.
        say: takes a line on what is being done.

    Returns:
        What the branches hold now, and the URL of the collection, if there is one.

    Raises:
        PublishError: a name, the token, the Hub or what it holds stands in the way; branches that had their
            commit have it, and all others are as they were.
        ModelError, DataError, ExportError, ConfigError: a model or the results cannot be published.
    """
    targets = plan(asked)
    hub = Hub(chosen_endpoint(asked.endpoint), read_token())
    hub.check_may_write(asked.namespace)
    for repo_id in _repo_ids(targets):
        _check_state(repo_id, hub.state(repo_id), asked)
    with exports_of(asked, say) as exports:
        for target in targets:
            if target.is_last:  # of every model, so that one that cannot be published stops the others too
                Branch(hub, target, exports.files(target), asked).check(exports.place)
        with progress_bar(total=len(targets), desc="published", unit="branch") as bar:
            published = []
            for target in targets:
                published.append(_publish(hub, target, exports, asked, say))
                bar.update()
    return published, _collect(hub, targets, asked)


def draft(asked: Publication, say: Say) -> Iterator[Draft]:
    """What ``publish`` would send, exported and checked one after the other; no network is used."""
    targets = plan(asked)
    chosen_endpoint(asked.endpoint)
    with exports_of(asked, say) as exports:
        for target in targets:
            files = exports.files(target)
            sizes = {name: file.num_bytes for name, file in files.items()}
            yield Draft(target.repo_id, target.branch, sizes, files["README.md"].path.read_text("utf-8"))
            exports.drop(target)


def _repo_ids(targets: list[Target]) -> list[str]:
    return list(dict.fromkeys(target.repo_id for target in targets))


def _check_state(repo_id: str, state: RemoteState | None, asked: Publication) -> None:
    if state is None:
        return
    if asked.is_private and not state.is_private:
        raise PublishError(
            f"{repo_id} is there and public; make it private in its settings, or leave out --private"
        )
    if asked.revision in state.tags:
        raise PublishError(f"--revision {asked.revision} is a tag of {repo_id}; name a branch, or a new one")
    if asked.tag in state.branches:
        raise PublishError(f"--tag {asked.tag} is a branch of {repo_id}; choose another")


def _publish(hub: Hub, target: Target, exports: Exports, asked: Publication, say: Say) -> Published:
    files = exports.files(target)
    num_bytes = sum(file.num_bytes for file in files.values())
    branch = Branch(hub, target, files, asked)
    branch.check(exports.place)
    is_new = not branch.is_complete
    if is_new:
        say(f"uploading {len(files)} files, {num_bytes / 1e6:,.1f} MB, to {target.url(hub.endpoint)}")
        if branch.state is None:
            hub.create_repo(target.repo_id, asked.is_private)
            branch = Branch(hub, target, files, asked)
        commit = branch.write()
    else:
        commit = branch.head or ""
    if asked.tag and target.is_last and branch.tagged is None:
        hub.create_tag(target.repo_id, asked.tag, commit)
    exports.drop(target)
    return Published(
        target.repo_id, target.branch, target.url(hub.endpoint), commit, len(files), num_bytes, is_new
    )


def _collect(hub: Hub, targets: list[Target], asked: Publication) -> str | None:
    title = asked.collection_title
    return title and hub.collect(title, asked.namespace, asked.is_private, _repo_ids(targets))


# -- the exports -----------------------------------------------------------------------------------


@dataclass
class Exports:
    """Exported models in a temporary folder, each made when it is first asked for."""

    place: Path
    asked: Publication
    say: Say
    _made: dict[Target, dict[str, LocalFile]] = field(default_factory=dict)

    def files(self, target: Target) -> dict[str, LocalFile]:
        """Its files by their path in the repository."""
        if target not in self._made:
            self.say(f"exporting {target.model}")
            self._made[target] = local_files(self._export(target))
        return self._made[target]

    def drop(self, target: Target) -> None:
        """Give its room back."""
        del self._made[target]
        shutil.rmtree(self._folder(target), ignore_errors=True)

    def write_comparison(self) -> None:
        """The report anew, from results that name no place on this machine."""
        if self.asked.results is not None:
            write_report(public_results(read_results(self.asked.results)), self.place / COMPARISON_FOLDER)

    def _folder(self, target: Target) -> Path:
        return self.place / "models" / target.branch.replace("/", "+") / target.repo_id.split("/")[1]

    def _export(self, target: Target) -> Path:
        folder, comparison = self._folder(target), self.place / COMPARISON_FOLDER
        results = self.asked.results if target.is_last else None  # which are no other checkpoint's
        revision = None if target.branch == "main" else target.branch
        options = CardOptions(target.repo_id, self.asked.licence, results, results is not None, revision)
        export(target.model, folder, card=options, dtype=self.asked.dtype)
        if results is not None:
            shutil.copytree(comparison, folder / COMPARISON_FOLDER)
        return folder


@contextmanager
def exports_of(asked: Publication, say: Say) -> Iterator[Exports]:
    """Exports that are gone afterwards, whatever happens."""
    from safetensors import SafetensorError  # which writing weights to a full disk ends in

    try:
        with tempfile.TemporaryDirectory(prefix="sinktrain-publish-", ignore_cleanup_errors=True) as place:
            exports = Exports(Path(place), asked, say)
            exports.write_comparison()
            yield exports
    except (OSError, ExportError) as error:
        cause = error.__cause__ if isinstance(error, ExportError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        where = getattr(cause, "filename", None) or "the temporary folder"
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise PublishError(f"{where}: {reason}; if it is full, set TMPDIR to a folder with room") from error


def public_results(results: Results) -> Results:
    """The same results, less where things lay on this machine."""
    public = without_paths(results)
    texts = list(dict.fromkeys(row["text"] for row in public["perplexity"]))
    told = {key: value for key, value in results["environment"].items() if key in PUBLIC_ENVIRONMENT}
    known = without_folders(told) | public["environment"] | {"texts": texts}
    return public | {"environment": {key: value for key, value in known.items() if value is not None}}


def without_folders(value: Any) -> Any:
    """The same results, but of an absolute path the name alone, wherever one stands."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value
