"""The Hub on the loopback does what the Hub does, asked by the real client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, hub, use_hub  # noqa: F401
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: mit\n---\n# x\n"


@pytest.fixture
def api(hub: HubServer) -> HfApi:  # noqa: F811
    client = HfApi(endpoint=hub.url)
    client.create_repo("lab/x")
    return client


def additions(**files: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name.replace("__", "."), content) for name, content in files.items()]


def upload(client: HfApi, weights: bytes = WEIGHTS, **options: str) -> str:
    operations = additions(README__md=CARD, config__json=b"{}", model__safetensors=weights)
    return client.create_commit("lab/x", operations, commit_message="a model", **options).oid


def status_of(caught: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return caught.value.response.status_code


def count(server: HubServer, start: str) -> int:
    return sum(asked.startswith(start) for asked in server.requests)


def test_what_is_uploaded_is_downloaded(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    commit = upload(api)
    files = {"README.md": CARD, "config.json": b"{}", "model.safetensors": WEIGHTS}
    folder = Path(snapshot_download("lab/x", allow_patterns=list(files)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert folder.name == commit == api.model_info("lab/x").sha
    assert hub.repos["lab/x"].branches["main"].items() >= files.items()
    entries = {entry.path: entry for entry in api.list_repo_tree("lab/x")}
    assert {path for path, entry in entries.items() if entry.lfs} == {"model.safetensors"}
    assert entries == {entry.path: entry for entry in api.get_paths_info("lab/x", list(entries))}
    assert [old.title for old in api.list_repo_commits("lab/x")] == ["a model", "initial commit"]


def test_what_is_there_is_not_uploaded_again(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    commit = upload(api)
    assert upload(api) == commit
    assert (count(hub, "PUT /storage"), count(hub, "POST /api/models/lab/x/commit")) == (1, 1)


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(multipart_from=1000, part_size=30_000) as server:
        use_hub(server, tmp_path / "hf", monkeypatch)
        yield server


def test_a_large_file_goes_up_in_parts(in_parts: HubServer) -> None:
    client = HfApi(endpoint=in_parts.url)
    client.create_repo("lab/x")
    upload(client)
    assert count(in_parts, "PUT /storage/parts/") == 4
    assert Path(hf_hub_download("lab/x", "model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("server", ["hub", "in_parts"])
def test_bytes_of_another_hash_are_refused(
    server: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    at: HubServer = request.getfixturevalue(server)
    client = HfApi(endpoint=at.url)
    client.create_repo("lab/x")
    file = tmp_path / "model.safetensors"
    file.write_bytes(WEIGHTS)
    operation = CommitOperationAdd(file.name, file)
    assert operation.upload_info.sha256  # taken now
    file.write_bytes(WEIGHTS[::-1])
    before = at.repos["lab/x"].heads["main"]
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model.safetensors'") as caught:
        client.create_commit("lab/x", [operation], commit_message="wrong")
    assert "did not match" in str(caught.value.__cause__)
    assert at.repos["lab/x"].heads["main"] is before
    assert not at.repos["lab/x"].lfs


def test_a_cut_upload_leaves_the_branch_and_continues(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    repo = hub.repos["lab/x"]
    before = repo.heads["main"]
    hub.cut_uploads_after(150_000)
    first, second = WEIGHTS, WEIGHTS[::-1]
    for content, name in ((first, "a.safetensors"), (second, "b.safetensors")):
        operation = CommitOperationAdd(name, content)
        if content is first:
            api.preupload_lfs_files("lab/x", [operation])
        else:
            with pytest.raises(RuntimeError, match="Error while uploading"):
                api.preupload_lfs_files("lab/x", [operation])
    assert repo.heads["main"] is before
    assert list(repo.lfs.values()) == [first]
    hub.cut_uploads_after(math.inf)
    both = [CommitOperationAdd("a.safetensors", first), CommitOperationAdd("b.safetensors", second)]
    api.create_commit("lab/x", both, commit_message="continued")
    assert repo.branches["main"].items() >= {"a.safetensors": first, "b.safetensors": second}.items()
    assert count(hub, "PUT /storage") == 2


def test_a_cut_download_gives_no_file(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    upload(api)
    hub.cut_downloads_after(50_000)
    with pytest.raises(Exception, match=r"peer closed connection|disconnected"):
        hf_hub_download("lab/x", "model.safetensors")
    hub.cut_downloads_after(math.inf)
    assert Path(hf_hub_download("lab/x", "model.safetensors")).read_bytes() == WEIGHTS


def test_part_of_a_file_is_given(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    upload(api)
    blob = next(iter(hub.repos["lab/x"].lfs))
    url, session = f"{hub.storage}/storage/lab/x/{blob}", get_session()
    part = session.get(url, headers={"Range": "bytes=50000-50099"})
    assert (part.status_code, part.content) == (206, WEIGHTS[50_000:50_100])
    assert session.get(url, headers={"Range": "bytes=102399-"}).content == WEIGHTS[-1:]
    assert session.get(url, headers={"Range": "bytes=102400-"}).status_code == 416
    assert session.get(url, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400


def test_a_commit_is_whole_or_not_at_all(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    repo = hub.repos["lab/x"]
    first = repo.heads["main"]
    upload(api)
    second = repo.heads["main"]
    change = additions(config__json=b"[]")
    refused: list[tuple[int, list[CommitOperationAdd | CommitOperationDelete], str | None]] = [
        (412, change, first.id),
        (404, [*additions(a__json=b"1"), CommitOperationDelete("absent.json")], None),
    ]
    for status, operations, parent in refused:
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_commit("lab/x", operations, commit_message="no", parent_commit=parent)
        assert status_of(caught) == status
    blob = CommitOperationAdd("b.safetensors", WEIGHTS[:500])
    blob._upload_mode, blob._is_uploaded = "lfs", True  # as it claims, but the Hub does not have it
    with pytest.raises(HfHubHTTPError, match="pointed to a file that does not exist"):
        api.create_commit("lab/x", [*change, blob], commit_message="no")
    assert repo.heads["main"] is second
    hub.fail_next("POST .*/commit/", 403)
    with pytest.raises(HfHubHTTPError):
        api.create_commit("lab/x", additions(config__json=b"[]"), commit_message="no")
    assert repo.heads["main"] is second
    hub.fail_next("POST .*/commit/", None, is_late=True)
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit("lab/x", additions(config__json=b"[]"), commit_message="its answer is lost")
    assert repo.branches["main"]["config.json"] == b"[]"


def test_metadata_of_a_card_is_read(api: HfApi) -> None:
    result = "{task: {type: t}, dataset: {name: d, type: d}, metrics: [{value: 1}]}"
    for metadata, problem in [
        ("license: [", "bad YAML"),
        ("tags: 3", '"tags" with value "3" is not valid'),
        ("datasets: a dataset", '"datasets" with value "a dataset" is not valid'),
        (
            f"model-index: [{{name: x, results: [{result}]}}]",
            '"model-index" has a metric without type or value',
        ),
        ("model-index: [{name: x}]", '"model-index" lacks "task.type"'),
    ]:
        card = f"---\n{metadata}\n---\n".encode()
        with pytest.raises(ValueError, match="Invalid metadata in README") as caught:
            api.create_commit("lab/x", additions(README__md=card), commit_message="no")
        assert problem in str(caught.value)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit("lab/x", additions(README__md=b"# x"), commit_message="plain")


def test_branches_and_tags(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    first = hub.repos["lab/x"].heads["main"].id
    api.create_branch("lab/x", branch="step4", revision=first)
    last = upload(api)
    api.create_tag("lab/x", tag="v1")
    api.create_tag("lab/x", tag="v0", revision=first)
    refs = api.list_repo_refs("lab/x")
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": last, "step4": first}
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": last, "v0": first}
    upload(api, WEIGHTS[:700], revision="step4")
    for revision, weights in (("step4", WEIGHTS[:700]), ("v1", WEIGHTS), (last, WEIGHTS)):
        path = hf_hub_download("lab/x", "model.safetensors", revision=revision)
        assert Path(path).read_bytes() == weights
    for there in (
        lambda: api.create_branch("lab/x", branch="step4"),
        lambda: api.create_tag("lab/x", tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            there()
        assert status_of(caught) == 409
    api.delete_branch("lab/x", branch="step4")
    api.delete_tag("lab/x", tag="v0")
    refs = api.list_repo_refs("lab/x")
    assert [ref.name for ref in (*refs.branches, *refs.tags)] == ["main", "v1"]
    for branch in ("main", "absent"):
        with pytest.raises(HfHubHTTPError):
            api.delete_branch("lab/x", branch=branch)


def test_collections(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    made = api.create_collection("Sinks, compared", namespace="lab", description="two models")
    assert made.slug.startswith("lab/sinks-compared-")
    assert api.create_collection("Sinks, compared", namespace="lab", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, "lab/x", "model", note="the first")
    api.add_collection_item(made.slug, "lab/x", "model", exists_ok=True)
    found = api.get_collection(made.slug)
    assert [(item.item_id, item.item_type, item.note) for item in found.items] == [
        ("lab/x", "model", "the first")
    ]
    assert [one.title for one in api.list_collections(owner="lab")] == ["Sinks, compared"]
    for status, make in [
        (409, lambda: api.create_collection("Sinks, compared", namespace="lab")),
        (409, lambda: api.add_collection_item(made.slug, "lab/x", "model")),
        (404, lambda: api.add_collection_item(made.slug, "lab/absent", "model")),
        (400, lambda: api.create_collection("x" * 61, namespace="lab")),
        (403, lambda: api.create_collection("Others'", namespace="others")),
    ]:
        with pytest.raises(HfHubHTTPError) as caught:
            make()
        assert status_of(caught) == status


def test_what_is_not_there(api: HfApi) -> None:
    upload(api)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("lab/x", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit("lab/x", additions(a__json=b"1"), commit_message="no", revision="absent")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("lab/x", "absent.json")
    assert not api.file_exists("lab/x", "absent.json")


def test_who_may_read(hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    api.create_repo("lab/secret", private=True)
    upload(api)
    hub.gate("lab/x")
    with pytest.raises(GatedRepoError):
        hf_hub_download("lab/x", "config.json")
    assert hf_hub_download("lab/x", "README.md")
    hub.repos["lab/x"].admitted.add("tester")
    assert hf_hub_download("lab/x", "config.json")
    assert api.model_info("lab/secret").private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.model_info("lab/secret")
    assert status_of(caught) == 401
    assert api.model_info("lab/x").gated == "manual"
    with pytest.raises(GatedRepoError):
        hf_hub_download("lab/x", "model.safetensors")


def test_who_may_write(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    assert api.whoami()["name"] == "tester"
    anonymous, unknown = HfApi(endpoint=hub.url, token=False), HfApi(endpoint=hub.url, token="hf_wrong")
    reader = HfApi(endpoint=hub.url, token=hub.read_token)
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    hub.deny("lab/denied")
    for status, client, repo_id in [
        (401, anonymous, "lab/y"),
        (401, unknown, "lab/y"),
        (403, reader, "lab/y"),
        (403, api, "others/y"),
        (403, api, "lab/denied"),
        (409, api, "lab/x"),
    ]:
        with pytest.raises(HfHubHTTPError) as caught:
            client.create_repo(repo_id)
        assert status_of(caught) == status
    hub.deny("lab/x")
    for change in (
        lambda: upload(api),
        lambda: api.create_branch("lab/x", branch="b"),
        lambda: api.create_tag("lab/x", tag="t"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            change()
        assert status_of(caught) == 403
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        unknown.whoami()


def test_after_it_stopped_nobody_answers(hub: HubServer, api: HfApi) -> None:  # noqa: F811
    api.model_info("lab/x")
    hub.stop()
    with pytest.raises(Exception, match="Connection refused"):
        api.model_info("lab/x")
