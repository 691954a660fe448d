"""What a Hub answers: of its protocol, what ``huggingface_hub`` uses for models.

Written down from the client's source (``hf_api``, ``_commit_api``, ``lfs``, ``file_download``,
``_snapshot_download`` and ``utils._http`` of 2.4) and what it expects in answers. As there, large files are
on a host of their own, which refuses a request that carries a token. Xet is left out: the client is told not
to use it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from hub_repos import Collection, Commit, File, RefusedError, Repo, check_card, now

USER, ORG = "tester", "lab"


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    role: str | None = None
    """``write`` or ``read``, by the token; None without one."""

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Answer:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
REPO = r"([\w.-]+/[\w.-]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Lets a method of the server answer these requests; groups of the pattern are its arguments."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((methods, re.compile(pattern.replace("REPO", REPO)), function))
        return function

    return register


class Hub:
    """A Hub with the user ``tester``, who may write to ``tester/…`` and, as a member, to ``lab/…``.

    Args:
        multipart_from: bytes from which large files are asked for in parts of ``part_size`` bytes.
    """

    url: str
    storage: str
    """Where large files are: another host."""

    def __init__(self, multipart_from: int = 1 << 24, part_size: int = 1 << 22) -> None:
        self.multipart_from, self.part_size = multipart_from, part_size
        self.token, self.read_token = "hf_" + secrets.token_hex(17), "hf_" + secrets.token_hex(17)
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collection] = {}
        self._uploads: dict[str, tuple[str, str, dict[int, bytes]]] = {}
        self._denied: set[str] = set()

    def deny(self, name: str) -> None:
        """Nobody may write to this repository, or this organization."""
        self._denied.add(name)

    def gate(self, repo_id: str) -> None:
        """Nobody may read its files who isn't in ``repos[repo_id].admitted``."""
        self.repos[repo_id].is_gated = True

    def respond(self, request: Request) -> Answer:
        try:
            for methods, pattern, function in ROUTES:
                match = pattern.fullmatch(request.path)
                if match and request.method in methods.split("|"):
                    if not request.path.startswith("/storage/"):
                        request.role = self._role(request.headers.get("Authorization"))
                    groups = (None if group is None else unquote(group) for group in match.groups())
                    return function(self, request, *groups)
            raise RefusedError(404, "Sorry, we can't find the page you are looking for.")
        except RefusedError as refused:
            return refusal(refused)

    def _role(self, authorization: str | None) -> str | None:
        if authorization is None:
            return None
        roles = {f"Bearer {self.token}": "write", f"Bearer {self.read_token}": "read"}
        if authorization not in roles:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return roles[authorization]

    def _readable(self, request: Request, repo_id: str, files: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.is_private and not (request.role and _is_theirs(repo_id))):
            if request.role is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if files and repo.is_gated and not (request.role and USER in repo.admitted):
            why = f"Access to model {repo_id} is restricted."
            raise RefusedError(403 if request.role else 401, why, "GatedRepo")
        return repo

    def _writable(self, request: Request, repo_id: str) -> Repo:
        repo = self._readable(request, repo_id)
        self._check_writing(request, repo_id)
        return repo

    def _check_writing(self, request: Request, name: str) -> None:
        if request.role is None:
            raise RefusedError(401, "Invalid username or password.")
        is_denied = {name, name.split("/")[0]} & self._denied
        if request.role != "write" or is_denied or not _is_theirs(name):
            raise RefusedError(403, f'You don\'t have the rights to write to "{name}" with this token')

    # -- accounts and repositories ------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        if request.role is None:
            raise RefusedError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": ORG, "fullname": ORG, "roleInOrg": "write"}]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": request.role}}
        return Answer.of({"type": "user", "name": USER, "fullname": USER, "orgs": orgs, "auth": access})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        asked = request.json()
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self._check_writing(request, repo_id)
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.repos[repo_id] = Repo(repo_id, is_private=asked.get("visibility") == "private")
        return Answer.of({"url": url, "name": repo_id, "id": secrets.token_hex(12)})

    @route("GET", "/api/models/REPO(?:/revision/([^/]+))?")
    def model_info(self, request: Request, repo_id: str, revision: str | None) -> Answer:
        repo = self._readable(request, repo_id)
        commit = repo.at(revision or "main")
        return Answer.of(
            {
                "id": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.id,
                "lastModified": commit.date,
                "private": repo.is_private,
                "gated": "manual" if repo.is_gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [
                    _sibling(path, file, "blobs" in request.query) for path, file in _sorted(commit)
                ],
            }
        )

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        warnings = [{"message": warning} for warning in check_card(request.json()["content"])]
        return Answer.of({"errors": [], "warnings": warnings})

    @route("GET", "/api/models/REPO/tree/([^/]+)(?:/(.+))?")
    def tree(self, request: Request, repo_id: str, revision: str, folder: str | None) -> Answer:
        commit = self._readable(request, repo_id).at(revision)
        inside = f"{folder}/" if folder else ""
        is_recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        paths = [path for path in commit.files if path.startswith(inside)]
        if not paths:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        parts = [path[len(inside) :].split("/") for path in paths]
        shown = {inside + "/".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
        shown = {path for path in shown if is_recursive or "/" not in path[len(inside) :]}
        return Answer.of([_entry(path, commit) for path in sorted(shown)])

    @route("POST", "/api/models/REPO/paths-info/([^/]+)")
    def paths_info(self, request: Request, repo_id: str, revision: str) -> Answer:
        commit = self._readable(request, repo_id).at(revision)
        asked = parse_qs(request.body.decode()).get("paths", [])
        return Answer.of([_entry(path, commit) for path in asked if path in commit.files])

    @route("GET", "/api/models/REPO/commits/([^/]+)")
    def list_commits(self, request: Request, repo_id: str, revision: str) -> Answer:
        commits = self._readable(request, repo_id).commits(revision)
        keys = ("id", "title", "message", "date")
        return Answer.of([{key: getattr(old, key) for key in keys} | {"authors": []} for old in commits])

    @route("GET", "/api/models/REPO/refs")
    def refs(self, request: Request, repo_id: str) -> Answer:
        repo = self._readable(request, repo_id)

        def listed(kind: str, refs: dict[str, Commit]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.id}
                for name, commit in refs.items()
            ]

        branches, tags = listed("heads", repo.heads), listed("tags", repo.tags)
        return Answer.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("POST|DELETE", "/api/models/REPO/branch/([^/]+)")
    def branch(self, request: Request, repo_id: str, name: str) -> Answer:
        repo = self._writable(request, repo_id)
        if request.method == "POST":
            repo.create_ref(repo.heads, name, request.json().get("startingPoint") or "main")
        else:
            repo.delete_ref(repo.heads, name)
        return Answer()

    @route("POST|DELETE", "/api/models/REPO/tag/([^/]+)")
    def tag(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._writable(request, repo_id)
        if request.method == "POST":
            repo.create_ref(repo.tags, request.json()["tag"], revision)
        else:
            repo.delete_ref(repo.tags, revision)
        return Answer()

    # -- uploads ------------------------------------------------------------------------------------

    @route("POST", "/api/models/REPO/preupload/([^/]+)")
    def preupload(self, request: Request, repo_id: str, branch: str) -> Answer:
        repo = self._writable(request, repo_id)
        there = repo.at(branch).files
        files = []
        for file in request.json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            mode = repo.upload_mode(branch, path, file["size"], sample)
            oid = there[path].etag if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.of({"files": files})

    @route("POST", r"/REPO\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        repo, asked = self._writable(request, repo_id), request.json()
        if asked["operation"] != "upload" or not {"basic", "multipart"} & set(asked["transfers"]):
            raise RefusedError(400, "This server knows uploads, basic and multipart")
        objects = [self._lfs_object(repo, blob["oid"], blob["size"]) for blob in asked["objects"]]
        return Answer.of({"transfer": "basic", "objects": objects})

    def _lfs_object(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        known = {"oid": oid, "size": size}
        if oid in repo.lfs:
            return known
        if size < self.multipart_from:
            upload: dict[str, Any] = {"href": f"{self.storage}/storage/{repo.id}/{oid}?size={size}"}
        else:
            name = secrets.token_hex(8)
            self._uploads[name] = (repo.id, oid, {})
            numbers = range(1, math.ceil(size / self.part_size) + 1)
            parts = {str(number): f"{self.storage}/storage/parts/{name}/{number}" for number in numbers}
            header = {"chunk_size": str(self.part_size), **parts}
            upload = {"href": f"{self.url}/api/complete_multipart/{name}", "header": header}
        verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/verify"}
        return {**known, "actions": {"upload": upload, "verify": verify}}

    @route("PUT", "/storage/parts/([0-9a-f]+)/([0-9]+)")
    def put_part(self, request: Request, upload: str, number: str) -> Answer:
        _check_presigned(request)
        self._uploads[upload][2][int(number)] = request.body
        return Answer(headers={"ETag": _md5(request.body)})

    @route("POST", "/api/complete_multipart/([0-9a-f]+)")
    def complete_multipart(self, request: Request, upload: str) -> Answer:
        repo_id, oid, parts = self._uploads[upload]
        told = {part["partNumber"]: part["etag"] for part in request.json()["parts"]}
        if told != {number: _md5(part) for number, part in parts.items()}:
            raise RefusedError(400, "One or more of the specified parts could not be found")
        self._store(repo_id, oid, b"".join(parts[number] for number in sorted(parts)))
        del self._uploads[upload]
        return Answer.of({})

    @route("PUT", "/storage/REPO/([0-9a-f]{64})")
    def put_blob(self, request: Request, repo_id: str, oid: str) -> Answer:
        _check_presigned(request)
        if len(request.body) != int(request.query["size"][0]):
            raise RefusedError(400, "The upload has another size than it was announced with")
        self._store(repo_id, oid, request.body)
        return Answer(headers={"ETag": _md5(request.body)})

    def _store(self, repo_id: str, oid: str, content: bytes) -> None:
        if File(content).sha256 != oid:
            raise RefusedError(400, "The SHA256 you specified did not match what we received")
        self.repos[repo_id].lfs[oid] = content

    @route("POST", r"/REPO\.git/info/lfs/verify")
    def verify(self, request: Request, repo_id: str) -> Answer:
        repo, asked = self._writable(request, repo_id), request.json()
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "The large file is not there, or has another size")
        return Answer.of({})

    @route("POST", "/api/models/REPO/commit/([^/]+)")
    def commit(self, request: Request, repo_id: str, branch: str) -> Answer:
        repo = self._writable(request, repo_id)
        lines = [json.loads(line) for line in request.body.splitlines()]
        if request.query or [line["key"] for line in lines].count("header") != 1:
            raise RefusedError(400, "This server knows commits with one header, and no pull requests")
        changes = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
        for kind, value in changes:
            if kind == "file":
                value["content"] = base64.b64decode(value["content"], validate=True)
        header = next(line["value"] for line in lines if line["key"] == "header")
        made = repo.commit(branch, header, changes)
        url = f"{self.url}/{repo_id}/commit/{made.id}"
        return Answer.of({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""})

    # -- downloads ----------------------------------------------------------------------------------

    @route("GET|HEAD", "/REPO/resolve/([^/]+)/(.+)")
    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._readable(request, repo_id, files=path not in (".gitattributes", "README.md")).at(
            revision
        )
        known = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            absent = refusal(RefusedError(404, "Entry not found", "EntryNotFound"))
            return Answer(absent.body, 404, {**absent.headers, **known})
        file = commit.files[path]
        if not file.is_lfs:
            return _ranged(request, file.content, {**known, "ETag": f'"{file.etag}"'})
        known |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return Answer(
            status=302,
            headers={**known, "Location": f"{self.storage}/storage/{repo_id}/{file.etag}?signature=secret"},
        )

    @route("GET|HEAD", "/storage/REPO/([0-9a-f]{64})")
    def get_blob(self, request: Request, repo_id: str, oid: str) -> Answer:
        _check_presigned(request)
        content = self.repos[repo_id].lfs[oid]
        return _ranged(request, content, {"ETag": f'"{_md5(content)}"'})

    # -- collections --------------------------------------------------------------------------------

    @route("GET", "/api/collections")
    def list_collections(self, request: Request) -> Answer:
        owners = request.query.get("owner", [])
        found = [one for one in self.collections.values() if not owners or one.owner in owners]
        listed = [_collection(one) for one in found if request.role or not one.is_private]
        for one in listed:
            one["items"] = one["items"][:4]
            del one["position"]
        return Answer.of(listed)

    @route("POST", "/api/collections")
    def create_collection(self, request: Request) -> Answer:
        asked = request.json()
        self._check_writing(request, asked["namespace"])
        for there in self.collections.values():
            if (there.title, there.owner) == (asked["title"], asked["namespace"]):
                raise RefusedError(409, "This collection already exists", slug=there.slug)
        new = Collection.new(asked)
        self.collections[new.slug] = new
        return Answer.of(_collection(new))

    @route("GET|DELETE", "/api/collections/REPO")
    def collection(self, request: Request, slug: str) -> Answer:
        found = self._collection(request, slug)
        if request.method == "DELETE":
            self._check_writing(request, found.owner)
            del self.collections[slug]
        return Answer.of(_collection(found))

    @route("POST", "/api/collections/REPO/items")
    def add_item(self, request: Request, slug: str) -> Answer:
        found, asked = self._collection(request, slug), request.json()
        self._check_writing(request, found.owner)
        self._readable(request, asked["item"]["id"])
        found.add(asked)
        return Answer.of(_collection(found))

    def _collection(self, request: Request, slug: str) -> Collection:
        found = self.collections.get(slug)
        if found is None or (found.is_private and request.role is None):
            raise RefusedError(404, "Collection not found")
        return found


def refusal(refused: RefusedError) -> Answer:
    answer = Answer.of({"error": refused.message, **refused.more}, refused.status)
    answer.headers["X-Error-Message"] = refused.message
    if refused.code:
        answer.headers["X-Error-Code"] = refused.code
    return answer


def _is_theirs(name: str) -> bool:
    return name.split("/")[0] in (USER, ORG)


def _sorted(commit: Commit) -> list[tuple[str, File]]:
    return sorted(commit.files.items())


def _sibling(path: str, file: File, with_blobs: bool) -> dict[str, Any]:
    blob: dict[str, Any] = {"size": len(file.content), "blobId": file.oid}
    if file.is_lfs:
        blob["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return {"rfilename": path, **(blob if with_blobs else {})}


def _entry(path: str, commit: Commit) -> dict[str, Any]:
    file = commit.files.get(path)
    if file is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return entry


def _collection(one: Collection) -> dict[str, Any]:
    shown = {key: getattr(one, key) for key in ("slug", "title", "description", "items")}
    always = {"lastUpdated": now(), "position": 0, "theme": "blue", "upvotes": 0}
    return {**shown, **always, "private": one.is_private, "owner": {"name": one.owner, "type": "org"}}


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """The bytes that the request's Range asks for, or all."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        return Answer(content, 200, headers)
    start, size = int(asked[1]), len(content)
    if start >= size:
        return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
    end = min(int(asked[2] or size - 1), size - 1)
    return Answer(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


def _check_presigned(request: Request) -> None:
    if request.headers.get("Authorization"):
        raise RefusedError(
            400, "Only one auth mechanism allowed: the URL is signed, and a token came with it"
        )


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()
