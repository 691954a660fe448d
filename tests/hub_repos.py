"""What a Hub keeps: repositories of commits, branches, tags and large files, and collections of them."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

LFS_ENDINGS = "7z arrow bin bz2 ckpt gz h5 joblib model msgpack npy npz onnx parquet pb pickle pkl pt pth"
LFS_PATTERNS = [f"*.{ending}" for ending in [*LFS_ENDINGS.split(), "safetensors", "tar", "wasm", "xz", "zip"]]
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
"""What the Hub puts into a new repository, as its first commit."""

MOST_REGULAR_BYTES = 10 * 1024**2
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
MOST_LETTERS = {"title": 60, "description": 150}
"""Of a collection."""


class RefusedError(Exception):
    """What a request is answered with instead: HTTP status, message, and the Hub's code for the error."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes lie in git, or in the large file storage and a pointer in git."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return POINTER.format(self.sha256, len(self.content)).encode()

    @property
    def oid(self) -> str:
        return _git_hash(self.pointer if self.is_lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    message: str
    date: str
    parent: Commit | None
    files: dict[str, File]


@dataclass
class Repo:
    """A model's repository. ``lfs`` holds its large files by their sha256, in a commit or not yet."""

    id: str
    is_private: bool = False
    is_gated: bool = False
    admitted: set[str] = field(default_factory=set)
    heads: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {".gitattributes": File(GITATTRIBUTES.encode())}
        self.heads["main"] = _new_commit("initial commit", "", None, first)

    @property
    def branches(self) -> dict[str, dict[str, bytes]]:
        """What is on each branch: path -> bytes."""
        return {
            branch: {path: file.content for path, file in head.files.items()}
            for branch, head in self.heads.items()
        }

    def commits(self, revision: str) -> list[Commit]:
        """The newest first."""
        commit: Commit | None = self.at(revision)
        history = []
        while commit:
            history.append(commit)
            commit = commit.parent
        return history

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a commit's whole id."""
        named = self.heads.get(revision) or self.tags.get(revision)
        if named is None and re.fullmatch("[0-9a-f]{40}", revision):
            heads = [*self.heads, *self.tags]
            named = next((old for head in heads for old in self.commits(head) if old.id == revision), None)
        if named is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return named

    def upload_mode(self, branch: str, path: str, size: int, sample: bytes) -> str:
        attributes = self.at(branch).files.get(".gitattributes", File(b"")).content.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        is_large = size > MOST_REGULAR_BYTES or b"\0" in sample
        return "lfs" if is_large or any(fnmatch.fnmatch(name, pattern) for pattern in patterns) else "regular"

    def commit(
        self, branch: str, header: dict[str, Any], changes: list[tuple[str, dict[str, Any]]]
    ) -> Commit:
        """Move a branch by one commit, or refuse and leave it where it is."""
        if branch not in self.heads:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = self.heads[branch]
        if header.get("parentCommit") not in (None, parent.id):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for kind, value in changes:
            self._apply(files, kind, value)
        check_card(files.get("README.md", File(b"")).content.decode())
        new = _new_commit(header["summary"], header.get("description", ""), parent, files)
        self.heads[branch] = new
        return new

    def _apply(self, files: dict[str, File], kind: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if re.search(r"(^|/)(\.\.?|\.git)?(/|$)", path):
            raise RefusedError(400, f"Invalid path: {path}")
        if kind == "file":
            files[path] = File(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in self.lfs:
                raise RefusedError(
                    400, "Your push was rejected: LFS pointer pointed to a file that does not exist"
                )
            files[path] = File(self.lfs[value["oid"]], is_lfs=True)
        elif kind in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/"
            gone = [
                name for name in files if name == path or (kind[7:] == "Folder" and name.startswith(inside))
            ]
            if not gone:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusedError(400, f"{kind} is not an operation of a commit")

    def create_ref(self, refs: dict[str, Commit], name: str, revision: str) -> None:
        if re.search(r"[\s~^:?*\[\\]|\.\.|^[-/.]|[/.]$|//|@\{|\.lock$", name) or not name:
            raise RefusedError(400, f"Invalid reference name: {name}")
        if name in refs:
            raise RefusedError(409, f"Reference already exists: {name}")
        refs[name] = self.at(revision)

    def delete_ref(self, refs: dict[str, Commit], name: str) -> None:
        if name not in refs:
            raise RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        if refs is self.heads and name == "main":
            raise RefusedError(403, "The main branch cannot be deleted")
        del refs[name]


@dataclass
class Collection:
    slug: str
    title: str
    owner: str
    is_private: bool
    description: str | None
    items: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, asked: dict[str, Any]) -> Collection:
        for name, most in MOST_LETTERS.items():
            if len(asked.get(name) or "") > most:
                raise RefusedError(
                    400, f'"{name}" length must be less than or equal to {most} characters long'
                )
        words = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        slug = f"{asked['namespace']}/{words}-{secrets.token_hex(12)}"
        return cls(slug, asked["title"], asked["namespace"], asked["private"], asked.get("description"))

    def add(self, asked: dict[str, Any]) -> None:
        item = asked["item"]
        if any(item["id"] == there["id"] for there in self.items):
            raise RefusedError(409, f"The item {item['id']} is in this collection already")
        note = {"text": asked["note"]} if asked.get("note") else None
        position = len(self.items)
        self.items.append({"_id": secrets.token_hex(12), **item, "position": position, "note": note})


def check_card(text: str) -> list[str]:
    """Read the metadata of a model card as the Hub does.

    Returns:
        The warnings.

    Raises:
        RefusedError: 400, with all errors.
    """
    if not text:
        return []
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if block is None:
        return ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        metadata, errors = {}, [f"bad YAML: {error}"]
    else:
        errors = _metadata_errors(metadata) if isinstance(metadata, dict) else ["metadata must be a mapping"]
    if errors:
        listed = [{"message": message} for message in errors]
        raise RefusedError(400, "Invalid metadata in README.md", errors=listed, warnings=[])
    return []


def _metadata_errors(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("license", "license_name", "library_name", "pipeline_tag"):
        if not isinstance(metadata.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "language", "datasets", "base_model", "metrics"):
        values = metadata.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            is_id = key not in ("datasets", "base_model") or re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(value))
            if not isinstance(value, str) or not is_id:
                errors.append(f'"{key}" with value "{value}" is not valid')
    for model in metadata.get("model-index", []):
        for result in model.get("results") or [{}]:
            needed = {
                "name": model.get("name"),
                "task.type": result.get("task", {}).get("type"),
                "dataset.type": result.get("dataset", {}).get("type"),
                "dataset.name": result.get("dataset", {}).get("name"),
                "metrics": result.get("metrics"),
            }
            errors += [f'"model-index" lacks "{key}"' for key, value in needed.items() if not value]
            for metric in result.get("metrics") or []:
                if not metric.get("type") or metric.get("value") is None:
                    errors.append('"model-index" has a metric without type or value')
    return errors


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _new_commit(title: str, message: str, parent: Commit | None, files: dict[str, File]) -> Commit:
    return Commit(secrets.token_hex(20), title, message, now(), parent, files)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
