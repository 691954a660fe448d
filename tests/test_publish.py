"""What is published is what loads back; what cannot be is one line, and nothing half-published."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hub_server
import pytest
import torch
from example_results import example_results
from hub_server import HubServer, use_hub
from tiny_models import random_tokens, tiny_model, write_run
from tiny_runs import write_text_run

from sinktrain import cli
from sinktrain.model.checkpoints import CHECKPOINT_KEY, describe, load_model
from sinktrain.publishing.card import CardOptions
from sinktrain.publishing.export import export
from sinktrain.publishing.publish import without_folders
from sinktrain.publishing.repository import Hub

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
ATTRIBUTES = ".gitattributes"
REPORT = {"streaming.svg", *(f"comparison/{name}" for name in ("report.html", "results.json", "results.md"))}


hub = hub_server.hub


class Said(NamedTuple):
    code: int
    out: str
    err: str


Publish = Callable[..., Said]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Exports of which each is made once, as equal ones are equal byte for byte."""
    place = tmp_path_factory.mktemp("exports")

    @cache
    def made(model: str, card: CardOptions, dtype: str, written_at: int) -> Path:
        folder = place / str(made.cache_info().misses)
        return export(model, folder, card, dtype=dtype).folder

    def export_once(model: str, out: Path, card: CardOptions, dtype: str) -> None:
        checkpoint = next(
            path for path in (Path(model) / "checkpoints" / "last.ckpt", Path(model)) if path.is_file()
        )
        shutil.copytree(made(model, card, dtype, checkpoint.stat().st_mtime_ns), out)

    return export_once


@pytest.fixture
def publish(
    hub: HubServer,
    exports: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Publish:
    """``sinktrain publish`` in this process, to the Hub on the loopback."""
    monkeypatch.setattr("sinktrain.publishing.publish.export", exports)

    def run(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = cli.main(["publish", *map(str, arguments)])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and the report that compares them; not to be changed."""
    home = tmp_path_factory.mktemp("home")
    write_arm(home / "vanilla", num_sinks=0)
    write_arm(home / "sink", num_sinks=1)
    write_text_run(home / "wide", hidden_size=48)
    write_text_run(home / "Other" / "Vanilla", seed=3)
    write_run(tiny_model(), home / "bare")
    write_kept(home / "kept", (4, 600))
    (home / "compare").mkdir()
    (home / "compare" / "results.json").write_text(json.dumps(results_of(home / "vanilla", home / "sink")))
    return home


def write_arm(run: Path, num_sinks: int) -> None:
    """A run that the example results speak of."""
    write_text_run(run, num_sinks, seed=num_sinks)
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last)
    checkpoint[CHECKPOINT_KEY] |= {"arm": run.name, "seed": 1, "tokens_seen": 3_276_800}
    torch.save(checkpoint, last)


def results_of(*runs: Path) -> dict[str, Any]:
    """The example results, as those of these models."""
    results = example_results()
    for row, run in zip(results["models"], runs, strict=True):
        model = load_model(run)
        row["parameters"] = sum(weight.numel() for weight in model.parameters())
        row["sink"] = model.config.sink.to_dict()
        row["source"] = str(run)
    return results


def write_kept(run: Path, steps: tuple[int, ...]) -> None:
    """A run that kept these checkpoints, each of other weights."""
    last = run / "checkpoints" / "last.ckpt"
    for step in steps:
        last.unlink(missing_ok=True)
        write_text_run(run, seed=step)
        last.replace(last.with_name(f"step-{step:08d}.ckpt"))
        last.symlink_to(f"step-{step:08d}.ckpt")


def refused(said: Said) -> str:
    """The one line of a publication that failed."""
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    line = said.err.splitlines()[-1]
    others = said.err.splitlines()[:-1]
    assert all(
        re.match(r"sinktrain publish: (exporting|uploading) |published: .*\d\d:\d\d", one) for one in others
    )
    return line.removeprefix("sinktrain publish: ")


def puts(server: HubServer) -> list[str]:
    return [asked for asked in server.requests if asked.startswith("PUT ")]


def writes(server: HubServer) -> list[str]:
    """Requests that may change what the Hub holds."""
    return [asked for asked in server.requests if not re.match("GET|HEAD", asked)]


def model_of(branch: dict[str, bytes], folder: Path) -> Path:
    """A branch written down as a folder."""
    for name, content in branch.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# -- what is published -----------------------------------------------------------------------------


def test_a_pair_and_its_comparison_load_back_by_name_with_equal_logits(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    models = [home / "vanilla", home / "sink"]
    said = publish(*models, "--repo-id", "lab/tiny", "--results", home / "compare")
    assert said.code == 0, said.err
    assert set(hub.repos) == {"lab/tiny-vanilla", "lab/tiny-sink"}
    for model in models:
        repo_id = f"lab/tiny-{model.name}"
        repo = hub.repos[repo_id]
        assert set(repo.branches["main"]) == FILES | REPORT | {ATTRIBUTES}
        head = repo.heads["main"]
        assert head.title == f"sinktrain publish: {model.name}"
        assert len(repo.commits("main")) == 2
        num_bytes = sum(len(content) for name, content in repo.branches["main"].items() if name != ATTRIBUTES)
        assert f"{hub.url}/{repo_id}: 10 files, {num_bytes:,} bytes, commit {head.id[:8]}\n" in said.out
        tokens = random_tokens(280)
        assert torch.equal(load_model(repo_id)(tokens), load_model(model)(tokens))
        assert describe(repo_id).seed == describe(model).seed
    (collection,) = hub.collections.values()
    assert (collection.title, collection.owner) == ("tiny", "lab")
    assert [item["id"] for item in collection.items] == ["lab/tiny-vanilla", "lab/tiny-sink"]
    assert f"collection: {hub.url}/collections/{collection.slug}\n" in said.out


def test_published_again_nothing_is_sent_and_no_commit_is_made(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    """Which an export that is equal, byte for byte, makes possible."""
    command = (home / "sink", "--repo-id", "lab/sink", "--tag", "v1.0", "--results", home / "compare")
    first = publish(*command)
    assert first.code == 0, first.err
    commit = hub.repos["lab/sink"].heads["main"].id
    assert hub.repos["lab/sink"].tags["v1.0"].id == commit
    hub.requests.clear()
    again = publish(*command)
    assert again.out == first.out.rstrip() + ", already there, unchanged\n"
    assert writes(hub) == []
    assert hub.repos["lab/sink"].heads["main"].id == commit


def test_exports_of_a_model_are_equal_byte_for_byte(home: Path, tmp_path: Path) -> None:
    """On which it rests that what is there unchanged is neither sent nor committed again."""
    one, two = (export(home / "sink", tmp_path / part / "out").folder for part in ("one", "two"))
    assert {path.name for path in one.iterdir()} == FILES
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_a_later_step_of_the_same_run_is_one_commit_more(
    hub: HubServer,
    publish: Publish,
    home: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_kept(run, (4,))
    assert publish(run, "--repo-id", "lab/run").code == 0
    write_kept(run, (600,))
    said = publish(run, "--repo-id", "lab/run", "--json")
    (told,) = json.loads(said.out)["published"]
    head = hub.repos["lab/run"].heads["main"]
    assert (told["commit"], told["is_new"], told["branch"]) == (head.id, True, "main")
    assert [commit.title for commit in hub.repos["lab/run"].commits("main")] == [
        "sinktrain publish: run, step 600",
        "sinktrain publish: run, step 4",
        "initial commit",
    ]


def test_kept_checkpoints_are_branches_and_the_last_is_main(
    hub: HubServer,
    publish: Publish,
    home: Path,
    tmp_path: Path,
) -> None:
    command = (home / "kept", "--repo-id", "tester/kept", "--checkpoints", "all", "--private")
    said = publish(*command)
    assert said.code == 0, said.err
    repo = hub.repos["tester/kept"]
    assert repo.is_private
    assert set(repo.branches) == {"step4", "step600", "main"}
    for branch, step in (("step4", 4), ("step600", 600), ("main", 600)):
        assert set(repo.branches[branch]) == FILES | {ATTRIBUTES}
        assert len(repo.commits(branch)) == 2
        assert repo.heads[branch].title == f"sinktrain publish: kept, step {step}"
        loaded = load_model(model_of(repo.branches[branch], tmp_path / branch))
        checkpoint = home / "kept" / "checkpoints" / f"step-{step:08d}.ckpt"
        assert torch.equal(loaded.embed_out.weight, load_model(checkpoint).embed_out.weight)
    assert f"{hub.url}/tester/kept/tree/step4: 6 files" in said.out
    assert len(puts(hub)) == 2  # the last of them is main too
    assert publish(*command).out.count("already there, unchanged") == 3


def test_a_comparison_goes_with_the_checkpoint_that_it_measured_alone(
    publish: Publish, home: Path, tmp_path: Path
) -> None:
    results = results_of(home / "kept", home / "sink")
    results["models"][0] |= {"arm": "sink", "seed": 7, "tokens_seen": 6400}
    (tmp_path / "results.json").write_text(json.dumps(results))
    command = (home / "kept", "--repo-id", "lab/kept", "--checkpoints", "all", "--results", tmp_path)
    said = publish(*command, "--dry-run", "--json")
    assert said.code == 0, said.err
    drafts = {draft["branch"]: set(draft["files"]) for draft in json.loads(said.out)}
    assert drafts == {"step4": FILES, "step600": FILES, "main": FILES | REPORT}


def test_another_branch_starts_without_what_is_on_main(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    assert publish(home / "vanilla", "--repo-id", "lab/both").code == 0
    main = hub.repos["lab/both"].heads["main"].id
    said = publish(home / "bare", "--repo-id", "lab/both", "--revision", "bare", "--without-tokenizer")
    assert said.code == 0, said.err
    assert hub.repos["lab/both"].heads["main"].id == main
    without = {name for name in FILES if not name.startswith("tokenizer")}
    assert set(hub.repos["lab/both"].branches["bare"]) == without | {ATTRIBUTES}


def test_one_model_may_go_to_a_collection_that_is_there(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    for name in ("vanilla", "sink"):
        assert publish(home / name, "--repo-id", f"lab/{name}", "--collection", "All of them").code == 0
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection.items] == ["lab/vanilla", "lab/sink"]


def test_dry_run_shows_files_and_card_and_asks_nobody(
    hub: HubServer,
    publish: Publish,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.stop()
    said = publish(home / "kept", "--repo-id", "lab/kept", "--checkpoints", "all", "--dry-run")
    assert said.code == 0, said.err
    sizes = {"step4": 6, "step600": 6, "main": 6}
    for branch, num_files in sizes.items():
        assert re.search(
            rf"^lab/kept, branch {branch}: {num_files} files, [\d,]+ bytes$", said.out, re.MULTILINE
        )
    weights = sum(weight.numel() for weight in load_model(home / "kept").state_dict().values()) * 4
    (size,) = {int(size.replace(",", "")) for size in re.findall(r"([\d,]+)  model\.safetensors", said.out)}
    assert weights < size < weights + 4096
    assert said.out.count("library_name: transformers") == 1
    assert hub.requests == []


def test_weights_can_be_published_rounded(publish: Publish, home: Path) -> None:
    def size(*options: str) -> int:
        said = publish(home / "vanilla", "--repo-id", "lab/x", "--dry-run", "--json", *options)
        return int(json.loads(said.out)[0]["files"]["model.safetensors"])

    assert size("--dtype", "float16") < 0.6 * size()


def test_dry_run_as_json(publish: Publish, home: Path) -> None:
    said = publish(home / "vanilla", home / "sink", "--repo-id", "lab/t", "--dry-run", "--json")
    drafts = json.loads(said.out)
    assert [draft["repo_id"] for draft in drafts] == ["lab/t-vanilla", "lab/t-sink"]
    assert set(drafts[0]["files"]) == FILES
    assert drafts[1]["card"].startswith("---\n")


def test_endpoint_option_comes_before_the_environment(
    hub: HubServer,
    publish: Publish,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = publish(home / "vanilla", "--repo-id", "lab/x", "--endpoint", f"{hub.url}/")
    assert said.out.startswith(f"{hub.url}/lab/x: 6 files"), said.err
    assert "main" in hub.repos["lab/x"].branches


# -- secrets ---------------------------------------------------------------------------------------


def test_token_and_places_of_this_machine_are_nowhere(
    hub: HubServer,
    publish: Publish,
    home: Path,
    tmp_path: Path,
) -> None:
    results = results_of(home / "vanilla", home / "sink")
    results["environment"]["command"] = f"sinktrain compare {home}/vanilla --text=~/private/book.txt"
    (tmp_path / "results.json").write_text(json.dumps(results))
    told: list[str] = []
    command = (home / "vanilla", "--repo-id", "lab/x", "--results", tmp_path / "results.json")
    hub.fail_next("POST /api/models/lab/x/commit", 500)
    told += publish(*command[:-2])[1:]
    told += publish(*command)[1:]
    hub.deny("lab/x")
    told += publish(home / "sink", "--repo-id", "lab/x", "--replace")[1:]
    there = hub.repos["lab/x"].branches["main"]
    assert set(there) > REPORT
    written = b"\n".join([*there.values(), *(text.encode() for text in told)])
    assert hub.token.encode() not in written
    for place in (str(home), str(tmp_path), "~/private", str(Path.home())):
        assert place.encode() not in b"\n".join(there.values()), place


def test_an_error_that_tells_the_token_is_mended(hub: HubServer) -> None:
    with (
        pytest.raises(Exception, match="broke off: Bearer … is odd: http://store/a; run") as caught,
        Hub(hub.url, hub.token)._told("x"),
    ):
        raise ValueError(f"Bearer {hub.token} is odd: http://store/a?signature=1")
    assert hub.token not in str(caught.value)
    assert hub.token not in repr(Hub(hub.url, hub.token))


def test_absolute_paths_of_results_become_names() -> None:
    found = without_folders(
        {"a": ["/home/me/runs/sink", "see https://a.b/c/d", "a/b/c"], "b": 3, "c": "1 / 2"}
    )
    assert found == {"a": ["sink", "see https://a.b/c/d", "a/b/c"], "b": 3, "c": "1 / 2"}
    assert without_folders("x --text ~/a/b.txt --out='/tmp/o/p'") == "x --text b.txt --out='p'"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repo-id", "sink"), "--repo-id sink is not ORG/NAME; write your user or organization, then the"),
        (("--repo-id", "lab/a/b"), "--repo-id lab/a/b is not ORG/NAME"),
        (("--repo-id", "lab/a b"), "--repo-id lab/a b is no name on the Hub; use letters, digits"),
        (("--repo-id", "lab/a--b"), "--repo-id lab/a--b is no name on the Hub"),
        (
            ("--tag", "my tag"),
            '--tag "my tag" is no name of a branch or tag; use letters, digits, -, _ and ., su',
        ),
        (("--tag", ""), '--tag "" is no name of a branch or tag'),
        (("--revision", "a..b"), '--revision "a..b" is no name of a branch or tag'),
        (("--revision", "refs/pr/1"), '--revision "refs/pr/1" is no name of a branch or tag'),
        (("--revision", "a" * 40), "is no name of a branch or tag"),
        (
            ("--endpoint", "hub.example"),
            "--endpoint hub.example is no URL; write it like https://huggingface.co",
        ),
        (("--collection", "x" * 61), "is too long; give one of at most 60 letters: --collection"),
        (
            ("--checkpoints", "all"),
            "--checkpoints all: .*vanilla keeps none; name a run folder, or leave that",
        ),
        (
            ("--results", "nowhere.json"),
            r"nowhere.json cannot be read \(No such file or directory\); name a r",
        ),
        (("--licence", "mit"), 'unrecognized arguments: --licence mit; did you mean "--license"'),
    ],
)
def test_bad_names_are_told_before_anything_is_written(
    hub: HubServer,
    publish: Publish,
    home: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x", *options))
    assert re.search(message, line), line
    assert writes(hub) == []


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            ("EleutherAI/pythia-14m",),
            "EleutherAI/pythia-14m is on the Hub already; publish a run or a folder of y",
        ),
        (
            ("bare",),
            "bare has no tokenizer, so others could not use it; put its tokenizer.json there, or say --with",
        ),
        (("vanilla", "vanilla"), "a MODEL is named twice; name each once"),
        (
            ("vanilla", "Other/Vanilla"),
            'vanilla and .*Vanilla would both be called "vanilla"; publish each with',
        ),
        (("vanila",), 'vanila does not exist; did you mean "vanilla"'),
    ],
)
def test_bad_models_are_told_before_anything_is_asked(
    hub: HubServer,
    publish: Publish,
    home: Path,
    models: tuple[str, ...],
    message: str,
) -> None:
    named = [model if model.startswith("Eleuther") else str(home / model) for model in models]
    line = refused(publish(*named, "--repo-id", "lab/x"))
    assert re.search(message, line), line
    assert hub.requests == []


def test_checkpoints_of_a_run_and_the_branch_of_the_last_differ(publish: Publish, home: Path) -> None:
    command = (home / "kept", "--repo-id", "lab/x", "--checkpoints", "all", "--revision", "step4")
    assert "--revision step4 is what --checkpoints all calls a checkpoint; use another" in refused(
        publish(*command)
    )


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "there is no token for the Hub; log in with: hf auth login, or set HF_TOKEN"),
        ("hf_" + "0" * 34, "lab: refused (401); the Hub does not know the token; log in again: hf auth l"),
        ("hf_ä" + "0" * 30, "the token holds characters that no token has; log in again: hf auth login"),
        ("read", "the token may only read for lab; use one with the permission to write (http"),
    ],
)
def test_bad_tokens_are_told_before_anything_is_exported(
    hub: HubServer,
    publish: Publish,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    message: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    token = hub.read_token if token == "read" else token
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = publish(home / "vanilla", "--repo-id", "lab/x")
    assert message in refused(said), said.err
    assert "exporting" not in said.err
    assert not token or token not in said.err
    assert writes(hub) == []


def test_an_organization_of_others_is_refused(hub: HubServer, publish: Publish, home: Path) -> None:
    line = refused(publish(home / "vanilla", "--repo-id", "google/x"))
    assert line == "the token may not publish for google; it is known for lab, tester: use one of those"


def test_no_permission_is_one_line(hub: HubServer, publish: Publish, home: Path) -> None:
    hub.deny("lab")
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line.startswith("lab/x: refused (403) "), line
    assert line.endswith("; the token may not write there; use one that may, or another --repo-id")
    assert hub.repos == {}


def test_no_network_is_one_line(hub: HubServer, publish: Publish, home: Path) -> None:
    hub.stop()
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line.startswith(f"{hub.url} cannot be reached, or broke off: "), line
    assert line.endswith("; run the same command again, and it continues")


def test_offline_is_told(publish: Publish, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line == "HF_HUB_OFFLINE is set, and publishing needs the network; unset it"


def other_model(hub: HubServer, repo_id: str, files: dict[str, bytes]) -> str:
    """What somebody else's tools put on main; the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(hub.url, token=hub.token)
    api.create_repo(repo_id, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message="theirs").oid)


REMEDY = "take another --repo-id, a new --revision, or --replace what is there"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"pytorch_model.bin": b"\0"}, "a model that sinktrain did not publish"),
        ({"config.json": b"{}", "a/model.safetensors": b"\0"}, "a model that sinktrain did not publish"),
        ({"config.json": b"what", "model.gguf": b"\0"}, "a model that sinktrain did not publish"),
        ({"config.json": b'{"sinktrain": {"seed": 8}}'}, r"another model \(its seed is 8, not 1\)"),
        (
            {"config.json": b'{"sinktrain": {}, "hidden_size": 7}'},
            r"another model \(its hidden_size is 7, not 32",
        ),
    ],
)
def test_another_model_is_not_replaced_unless_asked(
    hub: HubServer,
    publish: Publish,
    home: Path,
    files: dict[str, bytes],
    why: str,
) -> None:
    theirs = other_model(hub, "lab/x", files)
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert re.fullmatch(f"lab/x, branch main, holds {why}.*; {REMEDY}", line), line
    assert hub.repos["lab/x"].heads["main"].id == theirs
    assert puts(hub)[1:] == []  # theirs alone


def test_another_model_is_replaced_with_all_that_was_there_when_asked(
    hub: HubServer, publish: Publish, home: Path
) -> None:
    other_model(hub, "lab/x", {"config.json": b"{}", "a/model.gguf": b"\0", "NOTES.md": b"theirs"})
    assert publish(home / "vanilla", "--repo-id", "lab/x", "--replace").code == 0
    assert set(hub.repos["lab/x"].branches["main"]) == FILES | {ATTRIBUTES}


def test_what_the_hub_holds_writes_no_codes_to_the_terminal(
    hub: HubServer, publish: Publish, home: Path
) -> None:
    theirs = json.dumps({CHECKPOINT_KEY: {"run_id": "x", "arm": "\x1b]0;mine\x07"}}).encode()
    other_model(hub, "lab/x", {"config.json": theirs})
    assert "(its arm is ?]0;mine?, not vanilla)" in refused(publish(home / "vanilla", "--repo-id", "lab/x"))


def test_the_other_arm_is_another_model(hub: HubServer, publish: Publish, home: Path) -> None:
    assert publish(home / "vanilla", "--repo-id", "lab/x").code == 0
    line = refused(publish(home / "sink", "--repo-id", "lab/x"))
    assert "holds another model (its arm is vanilla, not sink); " in line
    assert publish(home / "sink", "--repo-id", "lab/x", "--revision", "sink").code == 0
    assert set(hub.repos["lab/x"].branches) == {"main", "sink"}


def test_a_note_of_somebody_stays_and_an_older_report_goes(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    other_model(hub, "lab/x", {"NOTES.md": b"mine", "README.md": b"# soon"})
    assert publish(home / "vanilla", "--repo-id", "lab/x", "--results", home / "compare").code == 0
    assert set(hub.repos["lab/x"].branches["main"]) == FILES | REPORT | {ATTRIBUTES, "NOTES.md"}
    assert publish(home / "vanilla", "--repo-id", "lab/x").code == 0
    assert set(hub.repos["lab/x"].branches["main"]) == FILES | {ATTRIBUTES, "NOTES.md"}


def test_a_tag_of_another_commit_is_taken_and_one_of_this_commit_is_fine(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    theirs = other_model(hub, "lab/x", {"NOTES.md": b"mine"})
    hub.repos["lab/x"].tags["v1"] = hub.repos["lab/x"].heads["main"]
    hub.requests.clear()
    command = (home / "vanilla", "--repo-id", "lab/x")
    line = refused(publish(*command, "--tag", "v1"))
    assert line == f"--tag v1 of lab/x is taken by its commit {theirs[:8]}; choose another"
    assert writes(hub) == []
    assert publish(*command, "--tag", "v2").code == 0
    assert publish(*command, "--tag", "v2").out.endswith("already there, unchanged\n")
    assert "is taken by its commit" in refused(publish(*command, "--tag", "v2", "--license", "mit"))
    assert "--revision v2 is a tag of lab/x; name a branch" in refused(publish(*command, "--revision", "v2"))
    assert "--tag main is a branch of lab/x; choose another" in refused(publish(*command, "--tag", "main"))


def test_a_public_repository_is_not_filled_as_a_private_one(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    other_model(hub, "lab/x", {"NOTES.md": b"mine"})
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x", "--private"))
    assert line == "lab/x is there and public; make it private in its settings, or leave out --private"


def test_a_gated_repository_is_one_line(hub: HubServer, publish: Publish, home: Path) -> None:
    theirs = other_model(hub, "lab/x", {"config.json": b"{}", "model.safetensors": b"\0"})
    hub.gate("lab/x")
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line.startswith(
        f"lab/x is gated; ask for access at {hub.url}/lab/x, then run the same command again"
    )
    assert hub.repos["lab/x"].heads["main"].id == theirs


def test_a_branch_that_moved_meanwhile_is_left_alone(
    hub: HubServer,
    publish: Publish,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload = Hub.upload

    def upload_slowly(*arguments: Any) -> Any:
        uploaded = upload(*arguments)
        other_model(hub, "lab/x", {"NOTES.md": b"meanwhile"})
        return uploaded

    monkeypatch.setattr(Hub, "upload", upload_slowly)
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line.startswith("lab/x: refused (412) "), line
    assert "its branch moved meanwhile; see who else publishes there, then run the same command again" in line
    assert set(hub.repos["lab/x"].branches["main"]) == {ATTRIBUTES, "NOTES.md"}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("POST /api/repos/create", 403, r"lab/x: refused \(403\) .* the token may not write there"),
        ("POST .*lfs/objects/batch", 413, r"lab/x: refused \(413\) .* the Hub finds it too large"),
        ("POST .*/verify", 404, r"lab/x: refused \(404\) .* the Hub has it not, or hides it from this token"),
        ("POST .*/preupload", 418, r"lab/x: refused \(418\) .* mend that, and try again"),
        ("POST .*/commit", 500, "has a problem of its own; run the same command again, and it continues"),
        (
            "POST .*/commit",
            None,
            "cannot be reached, or broke off: .*; run the same command again, and it cont",
        ),
        (
            "POST .*/tag",
            429,
            r"lab/x: refused \(429\) .* asks for a pause; wait some minutes, then run the same",
        ),
    ],
)
def test_each_refusal_is_one_line_and_the_same_command_continues(
    hub: HubServer,
    publish: Publish,
    home: Path,
    request_: str,
    status: int | None,
    message: str,
) -> None:
    command = (home / "vanilla", "--repo-id", "lab/x", "--tag", "v1")
    hub.fail_next(request_, status)
    line = refused(publish(*command))
    assert re.search(message, line), line
    is_late = request_.endswith("tag")
    assert ("lab/x" in hub.repos and "README.md" in hub.repos["lab/x"].branches["main"]) == is_late
    sent = len(puts(hub))
    assert publish(*command).code == 0
    assert len(puts(hub)) == 1
    assert sent == (
        request_ not in ("POST /api/repos/create", "POST .*lfs/objects/batch", "POST .*/preupload")
    )
    assert set(hub.repos["lab/x"].branches["main"]) == FILES | {ATTRIBUTES}
    assert len(hub.repos["lab/x"].commits("main")) == 2
    assert hub.repos["lab/x"].tags["v1"] == hub.repos["lab/x"].heads["main"]


def test_a_commit_whose_answer_is_lost_is_found_by_the_same_command(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    command = (home / "vanilla", "--repo-id", "lab/x")
    hub.fail_next("POST .*/commit", None, is_late=True)
    refused(publish(*command))
    assert publish(*command).out.endswith("already there, unchanged\n")
    assert len(hub.repos["lab/x"].commits("main")) == 2


def test_an_upload_cut_in_the_middle_continues_and_sends_no_file_twice(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    """Of three large files two arrive, then the connection breaks, for the client's own tries as well."""
    command = (home / "kept", "--repo-id", "lab/x", "--checkpoints", "all")
    size = (home / "kept" / "checkpoints" / "last.ckpt").stat().st_size
    hub.cut_uploads_after(size * 1.5)
    line = refused(publish(*command))
    assert line.startswith(f"{hub.url} cannot be reached, or broke off: "), line
    repo = hub.repos["lab/x"]
    assert set(repo.branches["step4"]) == FILES | {ATTRIBUTES}
    assert set(repo.branches) == {"step4", "main"}
    assert set(repo.branches["main"]) == {ATTRIBUTES}
    arrived = set(repo.lfs)
    hub.cut_uploads_after(math.inf)
    hub.requests.clear()
    said = publish(*command)
    assert said.code == 0, said.err
    assert [line.endswith("unchanged") for line in said.out.splitlines()] == [True, False, False]
    assert len(puts(hub)) == 1
    assert not any(blob in put for blob in arrived for put in puts(hub))
    assert [len(repo.commits(branch)) for branch in ("step4", "step600", "main")] == [2, 2, 2]


def test_without_room_for_the_export_is_one_line(
    hub: HubServer,
    publish: Publish,
    home: Path,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        line = refused(publish(home / "vanilla", "--repo-id", "lab/never-exported-before"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"File too large.*; if it is full, set TMPDIR to a folder with room", line)
    assert hub.repos == {}


def test_no_temporary_folder_is_one_line(
    publish: Publish, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x", "--dry-run"))
    assert line.endswith("No such file or directory; if it is full, set TMPDIR to a folder with room"), line


def test_nothing_is_left_in_the_temporary_folder(
    hub: HubServer,
    publish: Publish,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    assert publish(home / "vanilla", "--repo-id", "lab/x").code == 0
    hub.deny("lab/x")
    refused(publish(home / "vanilla", "--repo-id", "lab/x", "--license", "mit"))
    assert set(tmp_path.iterdir()) == before


def edit_answers(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, pattern: str, edit: Callable[[Any], None]
) -> None:
    """Let the Hub change the JSON of its answers to these requests."""
    answer = hub.answer

    def edited(request: Any) -> Any:
        given = answer(request)
        if re.fullmatch(pattern, f"{request.method} {request.path}"):
            value = json.loads(given.body)
            edit(value)
            given.body = json.dumps(value).encode()
        return given

    monkeypatch.setattr(hub, "answer", edited)


def test_a_reader_of_an_organization_is_told(
    hub: HubServer, publish: Publish, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_answers(hub, monkeypatch, "GET .*whoami-v2", lambda me: me["orgs"][0].update(roleInOrg="read"))
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line.startswith("the token may only read for lab; use one with the permission to write (http"), (
        line
    )
    assert publish(home / "vanilla", "--repo-id", "tester/x").code == 0


def test_a_repository_that_was_renamed_is_told(
    hub: HubServer, publish: Publish, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_model(hub, "lab/x", {"NOTES.md": b"mine"})
    edit_answers(hub, monkeypatch, "GET /api/models/lab/x", lambda info: info.update(id="lab/y"))
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line == "lab/x is called lab/y now; write --repo-id lab/y"


def test_a_file_that_the_repository_ignores_is_told(
    hub: HubServer, publish: Publish, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignore_configs(answer: Any) -> None:
        for file in answer["files"]:
            file["shouldIgnore"] = file["path"] == "config.json"

    edit_answers(hub, monkeypatch, "POST .*/preupload/main", ignore_configs)
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    remedy = "remove that file, and try again"
    assert line == f"lab/x would leave out config.json, as its .gitignore asks; {remedy}"
    assert set(hub.repos["lab/x"].branches["main"]) == {".gitattributes"}  # which has not moved


def test_a_hub_without_xet_is_told(
    hub: HubServer, publish: Publish, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line.startswith(f"{hub.url} does not take lab/x by Xet: "), line
    assert line.endswith("; set HF_HUB_DISABLE_XET=1, then run the same command again, and it continues")


def test_a_token_of_a_ci_that_cannot_be_had_is_told(
    publish: Publish, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_OIDC_RESOURCE", "lab")
    line = refused(publish(home / "vanilla", "--repo-id", "lab/x"))
    assert line == "the token cannot be read (OIDCError); log in again: hf auth login"


# -- killed ----------------------------------------------------------------------------------------

FORKING = """
import json, os, sys
from sinktrain.cli import main
import huggingface_hub.hf_api, sinktrain.publishing.publish, transformers.models.gpt_neox.modeling_gpt_neox
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Processes that publish, without the seconds of imports each time."""


class KillingHub(HubServer):
    """Kills ``victim`` once it has seen so many requests and pieces of uploads since ``arm``."""

    victim = 0
    seen = 0
    moment: float = math.inf

    def arm(self, moment: float) -> None:
        self.seen, self.moment = 0, moment

    def _see(self) -> None:
        self.seen += 1
        if self.seen >= self.moment:
            self.moment = math.inf
            os.kill(self.victim, signal.SIGKILL)

    def take(self, direction: str, num_bytes: int) -> None:
        self._see()
        super().take(direction, num_bytes)

    def answer(self, request: Any) -> Any:
        self._see()
        answered = super().answer(request)
        self._see()
        return answered


@pytest.fixture
def killing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[KillingHub, Callable[..., int]]]:
    """A Hub, and what publishes to it in another process and returns how that ended."""
    server = KillingHub()
    with server:
        use_hub(server, tmp_path / "hf", monkeypatch)
        (tmp_path / "tmp").mkdir()
        environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def run(*arguments: str | Path) -> int:
            print(json.dumps([*map(str, arguments), "--json"]), file=stdin, flush=True)
            server.victim = int(stdout.readline())
            ended = next(line for line in stdout if re.fullmatch(r"\d+\n", line))
            return os.waitstatus_to_exitcode(int(ended))

        yield server, run
        process.kill()
        process.wait()
        stdin.close()
        stdout.close()


@pytest.mark.slow
def test_killed_at_any_moment_branches_are_empty_or_whole_and_the_same_command_completes_them(
    killing: tuple[KillingHub, Callable[..., int]], tmp_path: Path
) -> None:
    """At 20 moments, one of each part of the publication so that none is left out by chance."""
    server, run = killing
    write_kept(tmp_path / "run", (4, 600))

    def command(repo_id: str) -> tuple[str | Path, ...]:
        return "publish", tmp_path / "run", "--repo-id", repo_id, "--checkpoints", "all", "--tag", "v1"

    assert run(*command("lab/undisturbed")) == 0
    num_moments, draw = server.seen, random.Random(7)
    bounds = [num_moments * part // 20 for part in range(21)]
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        moment = draw.randint(low + 1, high)
        repo_id = f"lab/killed{number}"
        server.arm(moment)
        assert run(*command(repo_id)) == -signal.SIGKILL, (moment, num_moments)
        repo = server.repos.get(repo_id)
        found = dict(repo.branches) if repo else {}
        server.requests.clear()
        arrived = set(repo.lfs) if repo else set()
        assert run(*command(repo_id)) == 0
        repo = server.repos[repo_id]
        assert set(repo.branches) == {"main", "step4", "step600"}
        for branch, files in repo.branches.items():
            assert set(files) == FILES | {ATTRIBUTES}
            assert found.get(branch, files) in (files, {ATTRIBUTES: files[ATTRIBUTES]}), (moment, branch)
            assert len(repo.commits(branch)) == 2
        assert repo.tags["v1"] == repo.heads["main"]
        assert not any(blob in put for blob in arrived for put in puts(server)), moment
        print(f"killed at {moment} of {num_moments}: {', '.join(map(str, sorted(found))) or 'no repository'}")
