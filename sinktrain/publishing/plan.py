"""What is published where, as data: made from what the user asked, before anything is written or sent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sinktrain.errors import PublishError
from sinktrain.model.checkpoints import describe, find_tokenizer
from sinktrain.model.hub import is_hub_id
from sinktrain.publishing.names import MAIN, check_ref, check_repo_id

LONGEST_TITLE = 60
"""Letters of a collection's title that the Hub takes."""

_STEP = re.compile(r"step-0*(\d+)\.ckpt")


@dataclass(frozen=True)
class Publication:
    """What to publish, and how.

    Args:
        models: MODELs, no Hub ids.
        repo_id: ORG/NAME of one model; of several ORG/NAME-<model name> each.
        results: results.json of a comparison that goes with each model, or its folder.
        is_private: make new repositories private; one that is public already is refused.
        revision: the branch to publish on.
        tag: a name for good of the commit on that branch.
        all_checkpoints: publish each kept checkpoint of a run folder too, as branch ``step<N>``.
        licence: SPDX id for the card.
        dtype: what weights are rounded to, ``float32``, ``bfloat16`` or ``float16``.
        collection: title of the collection; NAME where several models are published, none for one.
        may_replace: put the model in the place of another one.
        without_tokenizer: publish a model that has none.
        endpoint: URL of the Hub; HF_ENDPOINT, or the Hub's, when None.
    """

    models: Sequence[str]
    repo_id: str
    results: Path | None = None
    is_private: bool = False
    revision: str = MAIN
    tag: str | None = None
    all_checkpoints: bool = False
    licence: str | None = None
    dtype: str = "float32"
    collection: str | None = None
    may_replace: bool = False
    without_tokenizer: bool = False
    endpoint: str | None = None

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def collection_title(self) -> str | None:
        return self.collection or (self.repo_id.split("/")[1] if len(self.models) > 1 else None)


@dataclass(frozen=True)
class Target:
    """A model and the branch that will hold it, alone.

    Args:
        model: run folder, checkpoint or Hugging Face folder.
        repo_id: ORG/NAME.
        branch: name of the branch.
        message: of the commit.
        is_last: False for an intermediate checkpoint.
    """

    model: str
    repo_id: str
    branch: str
    message: str
    is_last: bool = True

    def url(self, endpoint: str) -> str:
        """Its page."""
        return f"{endpoint}/{self.repo_id}" + (f"/tree/{self.branch}" if self.branch != MAIN else "")


def plan(asked: Publication) -> list[Target]:
    """What goes where, intermediate checkpoints first; nothing is written, and no network used.

    Raises:
        PublishError: a name that the Hub does not allow, or a model that is not to be published.
        ModelError: there is no model.
    """
    check_repo_id("--repo-id", asked.repo_id)
    check_ref("--revision", asked.revision)
    if asked.tag is not None:
        check_ref("--tag", asked.tag)
    if len(asked.collection_title or "") > LONGEST_TITLE:
        raise PublishError(
            f'the collection\'s title "{asked.collection_title}" is too long; give one of at most '
            f"{LONGEST_TITLE} letters: --collection"
        )
    names = {model: _name(model) for model in asked.models}
    for model in asked.models:
        _check_model(model, asked)
    _check_distinct(asked.models, names)
    targets = []
    for model, name in names.items():
        repo_id = asked.repo_id if len(names) == 1 else f"{asked.repo_id}-{name}"
        check_repo_id(f"{model}:", repo_id)
        targets += _targets(model, repo_id, asked)
    return targets


def _name(model: str) -> str:
    """The model's name, as the Hub allows it in that of a repository."""
    if not Path(model).expanduser().exists() and is_hub_id(model):
        raise PublishError(
            f"{model} is on the Hub already; publish a run or a folder of yours, "
            "or copy that one: hf repos duplicate"
        )
    name = re.sub(r"[^a-z0-9_.]+", "-", describe(model).name.lower())
    return re.sub(r"\.\.+", ".", name).strip("-.")


def _check_model(model: str, asked: Publication) -> None:
    if not asked.without_tokenizer and find_tokenizer(model) is None:
        raise PublishError(
            f"{model} has no tokenizer, so others could not use it; put its tokenizer.json there, "
            "or say --without-tokenizer"
        )


def _check_distinct(models: Sequence[str], names: Mapping[str, str]) -> None:
    if len(names) < len(models):
        raise PublishError("a MODEL is named twice; name each once")
    for name, count in Counter(names.values()).items():
        if count > 1:
            same = " and ".join(model for model in models if names[model] == name)
            raise PublishError(
                f'{same} would both be called "{name}"; publish each with a --repo-id of its own'
            )


def _targets(model: str, repo_id: str, asked: Publication) -> list[Target]:
    last = Target(model, repo_id, asked.revision, _message(model))
    if not asked.all_checkpoints:
        return [last]
    paths = sorted((Path(model).expanduser() / "checkpoints").glob("step-*.ckpt"))
    steps = {path: match[1] for path in paths if (match := _STEP.fullmatch(path.name))}
    if not steps:
        raise PublishError(f"--checkpoints all: {model} keeps none; name a run folder, or leave that out")
    between = [
        Target(str(path), repo_id, f"step{step}", _message(str(path)), is_last=False)
        for path, step in steps.items()
    ]
    if asked.revision in (target.branch for target in between):
        raise PublishError(
            f"--revision {asked.revision} is what --checkpoints all calls a checkpoint; use another"
        )
    return [*between, last]


def _message(model: str) -> str:
    path = Path(model).expanduser()
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    step = _STEP.fullmatch(file.resolve().name)
    return f"sinktrain publish: {describe(model).name.split('/')[0]}" + (f", step {step[1]}" if step else "")
