"""Models come back from the Hub by name and revision, from its cache when it is away, and never as code."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, hub  # noqa: F401
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from test_checkpoints import assert_same_weights, split_weights, write_folder
from test_retrofit import FROM_START, ROWS, at_start
from tiny_models import edit_json, tiny_model
from tiny_runs import TEXT, TRAINED_LENGTH, tiny_tokenizer
from tiny_shards import SEQ_LEN

from sinktrain.cli import main
from sinktrain.errors import DataError, ModelError
from sinktrain.model.checkpoints import describe, load_model, require_tokenizer
from sinktrain.model.config import SinkConfig
from sinktrain.model.hub import download
from sinktrain.model.neox import GPTNeoX

REPO, EARLIER = "lab/x", "lab/x@step4"
SECONDS = 120


def make_model(seed: int, **changes: int) -> GPTNeoX:
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "max_position_embeddings": TRAINED_LENGTH}
    return tiny_model(sink=SinkConfig("token", 1, tokenizer.sink_token_ids[:1]), seed=seed, **sizes | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model by the revision that it is to be."""
    folders = {}
    for seed, revision in enumerate(("main", "step4")):
        folders[revision] = write_folder(make_model(seed), tmp_path_factory.mktemp("model") / revision)
        tiny_tokenizer().save(folders[revision] / "tokenizer.json")
    return folders


def put(server: HubServer, folder: Path, revision: str = "main", repo_id: str = REPO) -> str:
    """Make a revision of a repository what is in the folder, by the Hub's own client."""
    api = HfApi(endpoint=server.url)
    there = server.repos[repo_id].branches[revision] if repo_id in server.repos else {}
    api.create_repo(repo_id, exist_ok=True)
    names = [path.name for path in folder.iterdir()]
    gone = [CommitOperationDelete(name) for name in there if name not in (*names, ".gitattributes")]
    added = [CommitOperationAdd(path.name, path) for path in folder.iterdir()]
    return api.create_commit(repo_id, [*added, *gone], commit_message=folder.name, revision=revision).oid


@pytest.fixture
def lab(hub: HubServer, models: dict[str, Path]) -> Iterator[HubServer]:  # noqa: F811
    """A Hub with ``lab/x``, whose branch step4 holds another model than main."""
    put(hub, models["main"])
    HfApi(endpoint=hub.url).create_branch(REPO, branch="step4")
    put(hub, models["step4"], "step4")
    hub.requests.clear()
    forget()
    yield hub
    forget()


def forget() -> None:
    """What a new process would not know."""
    download.cache_clear()


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the model, to be changed and ``put``."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for path in models["main"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def stream(model: str, *options: str) -> int:
    return main(["stream", model, "--prompt", "So it goes", "--max-tokens", "8", "--seed", "0", *options])


# -- by name and revision ------------------------------------------------------------------------------


def test_a_model_is_loaded_by_name_and_revision(lab: HubServer, models: dict[str, Path]) -> None:
    main_model, earlier = (load_model(models[revision]) for revision in ("main", "step4"))
    HfApi(endpoint=lab.url).create_tag(REPO, tag="v1")
    commit = lab.repos[REPO].heads["step4"].id
    assert_same_weights(load_model(REPO), main_model)
    assert_same_weights(load_model(f"{REPO}@v1"), main_model)
    assert_same_weights(load_model(EARLIER), earlier)
    assert_same_weights(load_model(REPO, revision="step4"), earlier)
    assert_same_weights(load_model(f"{REPO}@{commit}"), earlier)
    assert [describe(source).name for source in (REPO, EARLIER)] == [REPO, EARLIER]
    assert (require_tokenizer(EARLIER) / "tokenizer.json").samefile(download(EARLIER) / "tokenizer.json")
    with pytest.raises(ModelError, match="lab/x@step4 names a revision, and v1 is another; leave one"):
        load_model(EARLIER, revision="v1")


def test_weights_in_several_files_are_loaded(lab: HubServer, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    split_weights(folder, weights, "model.safetensors", save_file)
    put(lab, folder, repo_id="lab/split")
    assert_same_weights(load_model("lab/split"), make_model(0))


def test_stream_and_export_take_a_revision(
    lab: HubServer, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {}
    for source, *options in (str(models["step4"]),), (EARLIER,), (REPO, "--revision", "step4"), (REPO,):
        assert stream(source, *options) == 0
        texts[source, *options] = capsys.readouterr().out
    local, named, optioned, newest = texts.values()
    assert local == named == optioned != newest
    assert main(["export", REPO, "--revision", "step4", "--out", str(tmp_path / "out")]) == 0
    assert_same_weights(load_model(tmp_path / "out"), load_model(models["step4"]))


def test_two_revisions_are_compared_and_one_evaluated(lab: HubServer, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--max-tokens", "64", "--streams", "2", "--tasks", "none"]
    assert main(["compare", REPO, EARLIER, *options, "--out", str(tmp_path / "both")]) == 0
    rows = json.loads((tmp_path / "both" / "results.json").read_text())["perplexity"]
    losses = {name: {row["loss_nats"] for row in rows if row["model"] == name} for name in (REPO, EARLIER)}
    assert all(losses.values())
    assert losses[REPO].isdisjoint(losses[EARLIER])
    assert main(["evaluate", EARLIER, *options, "--out", str(tmp_path / "one")]) == 0
    rows = json.loads((tmp_path / "one" / "results.json").read_text())["perplexity"]
    assert {row["loss_nats"] for row in rows} == losses[EARLIER]


def test_a_run_starts_from_a_revision(
    hub: HubServer,  # noqa: F811
    train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"vocab_size": ROWS, "max_position_embeddings": SEQ_LEN}
    for seed, revision in enumerate(("main", "step4")):
        put(hub, write_folder(tiny_model(seed=seed, **sizes), tmp_path / revision), "main", "lab/old")
        if revision == "main":
            HfApi(endpoint=hub.url).create_branch("lab/old", branch="first")
    run = train("run", "--model.init_from", "lab/old@first", *FROM_START)
    assert "from the weights of lab/old@first" in capsys.readouterr().err
    started, source = at_start(run), tiny_model(seed=0, **sizes).state_dict()
    assert all(torch.equal(started[name], weight) for name, weight in source.items())
    forget()


# -- without a network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["stopped", "offline"])
def test_the_second_use_needs_no_hub(
    lab: HubServer, models: dict[str, Path], away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(EARLIER)
    forget()
    if away == "stopped":
        lab.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lab.requests.clear()
    assert_same_weights(load_model(EARLIER), load_model(models["step4"]))
    assert lab.requests == []
    with pytest.raises(ModelError, match="lab/x is not here, not all of it is in the Hub's cache"):
        load_model(REPO)


FRESH = """\
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision, tokens, out = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
AutoTokenizer.from_pretrained(name, revision=revision)
with torch.no_grad():
    torch.save(model(torch.tensor([list(map(int, tokens.split(",")))])).logits, out)
"""


STREAM = ("-m", "sinktrain", "stream", EARLIER, "--prompt", "So it goes", "--max-tokens", "8", "--seed", "0")


def fresh(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which knows of the Hub by its environment alone."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], env=variables, capture_output=True, text=True, timeout=SECONDS
    )


@pytest.mark.slow
def test_a_fresh_process_streams_by_name(
    lab: HubServer, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done = fresh(*STREAM)
    stream(str(models["step4"]))
    assert (done.returncode, done.stdout) == (0, capsys.readouterr().out), done.stderr


@pytest.mark.slow
def test_fresh_processes_use_the_cache_and_transformers_loads_the_same(
    lab: HubServer, models: dict[str, Path], tmp_path: Path
) -> None:
    first = fresh(*STREAM)
    tokens, out = [tiny_tokenizer().sink_token_ids[0], 40, 41, 42], tmp_path / "logits.pt"
    plain = fresh("-c", FRESH, REPO, "step4", ",".join(map(str, tokens)), str(out))
    assert plain.returncode == 0, plain.stderr
    with torch.no_grad():
        ours = load_model(models["step4"])(torch.tensor([tokens]))
    torch.testing.assert_close(torch.load(out), ours, rtol=1e-5, atol=1e-4)
    offline = fresh(*STREAM, HF_HUB_OFFLINE="1")
    lab.stop()
    stopped = fresh(*STREAM)
    assert first.returncode == 0, first.stderr
    for again in (offline, stopped):
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    absent = fresh("-m", "sinktrain", "stream", REPO, HF_HUB_OFFLINE="1")
    assert absent.returncode == 2
    assert absent.stderr.endswith("and offline mode is on; unset HF_HUB_OFFLINE\n")
    assert absent.stderr.count("\n") == 1


# -- refusals ------------------------------------------------------------------------------------------


def assert_refused(model: str, said: str, capsys: pytest.CaptureFixture[str], *options: str) -> None:
    """One line on stderr that has no token in it, nothing on stdout, exit code 2."""
    capsys.readouterr()
    forget()
    assert stream(model, *options) == 2
    shown = capsys.readouterr()
    line = shown.err.removesuffix("\n")
    assert "\n" not in line, line
    assert "signature" not in line
    assert line.startswith("sinktrain stream: ")
    assert said in line
    assert (shown.out, re.search("hf_[A-Za-z0-9]{8}", line)) == ("", None)


def test_what_the_hub_does_not_give_is_one_line(
    lab: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = "is neither here nor on the Hub; mend the name, or log in if it is private: hf auth login"
    assert_refused("lab/absent", f"lab/absent {absent}", capsys)
    assert_refused("lab/x@step5", "lab/x has no revision step5 on the Hub; use one of its branches", capsys)
    assert_refused(REPO, "lab/x has no revision step5", capsys, "--revision", "step5")
    lab.fail_next("GET /api/models/lab/x", 503)
    assert_refused(REPO, "lab/x is not given: the Hub answers 503; try again later", capsys)
    lab.fail_next("GET /storage/lab/x", 410)
    assert_refused(REPO, "the Hub does not give it: Client error '410 Gone' for url", capsys)
    HfApi(endpoint=lab.url).create_repo("lab/empty")
    assert_refused("lab/empty", "lab/empty holds no model: there is no config.json", capsys)
    lab.gate(REPO)
    assert_refused(REPO, "lab/x is gated; ask for access on its Hub page, then log in", capsys)
    lab.repos[REPO].is_gated, lab.repos[REPO].is_private = False, True
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    assert_refused(REPO, "lab/x is not given: the Hub does not know the token; log in again", capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(REPO, f"lab/x {absent}", capsys)
    monkeypatch.setenv("HF_TOKEN", lab.token)
    assert stream(REPO) == 0


def test_without_hub_and_cache_it_is_one_line(
    lab: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.cut_downloads_after(5000)
    assert_refused(REPO, "lab/x is not here, and the Hub does not give it: ", capsys)
    lab.stop()
    unreachable = "lab/x is not here, not all of it is in the Hub's cache, and the Hub cannot be reached: "
    assert_refused(REPO, unreachable, capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = (
        "lab/x is not here, not all of it is in the Hub's cache, and offline mode is on; unset HF_HUB_OFFLINE"
    )
    assert_refused(REPO, offline, capsys)


def test_a_full_disk_is_one_line(lab: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert_refused(REPO, "lab/x cannot be stored in the Hub's cache: [Errno 27] File too large", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    forget()
    assert stream(REPO) == 0


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b'{"model_type": "gpt_n', "config.json is not JSON"),
        ("tokenizer.json", b"\x00\x01", "tokenizer.json: not a tokenizer"),
        ("model.safetensors", None, "model.safetensors is damaged"),
    ],
)
def test_a_damaged_file_of_a_repository_is_one_line(
    lab: HubServer,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: bytes | None,
    said: str,
) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    put(lab, folder)
    assert_refused(REPO, said, capsys)


BAD_NAMES = ["lab/../x", "lab/x..y", "lab/x--y", "lab/.x", "lab/x.git", "l" * 97 + "/x", "lab/x y", "lab/x\n"]
BAD_REVISIONS = [
    "",
    "two words",
    "../../other",
    "a..b",
    "-x",
    "/x",
    "x/",
    "a?b",
    "a#b",
    "a%2e",
    "ä",
    "a@b",
    "x\n",
]


def test_what_is_no_name_never_leaves_the_machine(lab: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    for name in BAD_NAMES:
        assert_refused(name, " ", capsys)
    for revision in BAD_REVISIONS:
        assert_refused(f"{REPO}@{revision}", "is no revision; name a branch, tag or commit, such as", capsys)
        assert_refused(REPO, "is no revision; name a branch, tag or commit", capsys, f"--revision={revision}")
        with pytest.raises(ModelError, match="is no revision"):
            load_model(REPO, revision=revision)
    assert_refused("lab/x..y", "lab/x..y is neither here nor a name on the Hub; use letters", capsys)
    assert_refused(EARLIER, "lab/x@step4 names a revision already; leave out", capsys, "--revision", "v1")
    assert_refused(
        "/nowhere", "--revision v1 is for Hub ids and /nowhere is none", capsys, "--revision", "v1"
    )
    assert lab.requests == []
    for allowed in ("refs/pr/1", "v1.0-rc+2"):
        assert_refused(f"{REPO}@{allowed}", f"lab/x has no revision {allowed} on the Hub", capsys)


def test_a_name_of_a_folder_that_exists_is_a_path(
    lab: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    assert_refused(EARLIER, "lab/x@step4 does not exist", capsys)
    assert lab.requests == []


# -- code ----------------------------------------------------------------------------------------------


class Evil:
    """What a pickle may hold: a call."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_code_of_a_repository_is_neither_fetched_nor_run(
    lab: HubServer, folder: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    code = (
        f"import os\nos.mkdir({str(mark)!r})\nclass Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"
    )
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "configuration_evil.Config"}
    edit_json(folder / "config.json", auto_map=auto_map)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    put(lab, folder)
    lab.requests.clear()
    assert_same_weights(load_model(REPO), make_model(0))
    assert stream(REPO) == 0
    assert main(["export", REPO, "--out", str(tmp_path / "out")]) == 0
    assert not mark.exists()
    assert not [asked for asked in lab.requests if asked.endswith((".py", ".bin"))]


def test_of_pickles_only_tensors_are_read(
    lab: HubServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    weights, mark = load_file(folder / "model.safetensors"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    put(lab, folder, repo_id="lab/pickled")
    assert_same_weights(load_model("lab/pickled"), make_model(0))
    said = "is damaged, or holds more than tensors and plain values"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    put(lab, folder, repo_id="lab/pickled")
    assert_refused("lab/pickled", said, capsys)
    torch.save({**weights, "more": Evil(mark)}, folder / "pytorch_model.bin")
    put(lab, folder, repo_id="lab/pickled")
    assert_refused("lab/pickled", said, capsys)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "the pickle would have done nothing to anyone"


def test_a_tokenizer_comes_by_name_and_revision(lab: HubServer) -> None:
    from sinktrain.data.tokenizer import load_tokenizer

    assert load_tokenizer(EARLIER).sha256 == tiny_tokenizer().sha256
    with pytest.raises(DataError, match="lab/x: 'a b' is no revision"):
        load_tokenizer("lab/x@a b")
