"""One branch of a repository, beside the files that it shall hold, and the commit that brings them there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sinktrain.errors import PublishError
from sinktrain.model.checkpoints import CHECKPOINT_KEY
from sinktrain.model.config import NetworkConfig
from sinktrain.publishing.card_results import COMPARISON_FOLDER, PICTURE_FILE
from sinktrain.publishing.plan import Publication, Target
from sinktrain.publishing.repository import ATTRIBUTES, Hub, LocalFile, changed

OF_A_COMPARISON = (f"{COMPARISON_FOLDER}/", PICTURE_FILE)
"""Where the files begin that a publication with other results, or none, takes away."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".onnx", ".msgpack")
IDENTITY = ("run_id", "data_fingerprint", "arm", "seed")
"""What tells one run from another, of what an export's config.json says of it."""

NETWORK = (*(part.name for part in fields(NetworkConfig)), "sink")


class Branch:
    """A branch as it is on the Hub now.

    Args:
        hub: where it is.
        target: which branch, and of which repository; neither need be there.
        files: all that the branch shall hold.
        asked: the publication that it is a part of.
    """

    def __init__(self, hub: Hub, target: Target, files: Mapping[str, LocalFile], asked: Publication) -> None:
        self.hub, self.target, self.files, self.asked = hub, target, files, asked
        self.state = hub.state(target.repo_id)
        self.head = self.state.branches.get(target.branch) if self.state else None
        self.there = hub.file_ids(target.repo_id, self.head) if self.head else {}
        self.replaces = asked.may_replace

    @property
    def is_complete(self) -> bool:
        """Whether nothing is to be done."""
        return self.head is not None and not changed(self.files, self.there) and not self._superfluous()

    @property
    def tagged(self) -> str | None:
        """What the tag that is asked for points to already."""
        tag = self.asked.tag if self.target.is_last else None
        return self.state.tags.get(tag) if self.state and tag else None

    def check(self, place: Path) -> None:
        """Raise PublishError if the branch holds another model, or the tag names another commit.

        Args:
            place: where files of the branch may be fetched to.
        """
        if self.head is not None and not self.is_complete and not self.replaces:
            self._check_same_model(self.head, place)
        if self.tagged is not None and not (self.is_complete and self.tagged == self.head):
            raise PublishError(
                f"--tag {self.asked.tag} of {self.target.repo_id} is taken by its commit {self.tagged[:8]}; "
                "choose another"
            )

    def write(self) -> str:
        """Bring the branch to its files by one commit, after all that is large has arrived.

        Returns:
            The commit.
        """
        target, repo_id = self.target, self.target.repo_id
        uploaded = self.hub.upload(repo_id, self.files)
        if self.head is None:
            self.head, self.replaces = self.hub.create_branch(repo_id, target.branch), True
            self.there = self.hub.file_ids(repo_id, self.head)
        removed = self._superfluous()
        commit = self.hub.commit(repo_id, target.branch, self.head, uploaded, removed, target.message)
        missing = changed(self.files, self.hub.file_ids(repo_id, commit))
        if missing:
            raise PublishError(
                f"{repo_id} left out {missing[0]}, as its .gitignore asks; remove that file, and try again"
            )
        return commit

    def _superfluous(self) -> list[str]:
        """Files of the branch that go: all others when a model is replaced, else of an older report alone."""
        others = [name for name in self.there if name not in self.files and name != ATTRIBUTES]
        return others if self.replaces else [name for name in others if name.startswith(OF_A_COMPARISON)]

    def _check_same_model(self, head: str, place: Path) -> None:
        theirs: dict[str, Any] = {}
        if "config.json" in self.there:
            theirs = self.hub.read_json(self.target.repo_id, head, "config.json", place / "there")
        where = f"{self.target.repo_id}, branch {self.target.branch},"
        remedy = "take another --repo-id, a new --revision, or --replace what is there"
        if isinstance(theirs.get(CHECKPOINT_KEY), dict):
            ours = json.loads(self.files["config.json"].path.read_text(encoding="utf-8"))
            if found := differences(theirs, ours):
                raise PublishError(f"{where} holds another model ({found[0]}); {remedy}")
        elif any(name.endswith(WEIGHTS) for name in self.there):
            raise PublishError(f"{where} holds a model that sinktrain did not publish; {remedy}")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What makes the models of these two config.json different ones: their runs, or their networks."""
    facts = theirs[CHECKPOINT_KEY], ours[CHECKPOINT_KEY]
    pairs = [(key, facts) for key in IDENTITY] + [(key, (theirs, ours)) for key in NETWORK]
    return [
        f"its {key} is {there[key]}, not {here[key]}"
        for key, (there, here) in pairs
        if key in there and key in here and there[key] != here[key]
    ]
