"""Text to shards: both splits, any number of workers, and the same bytes after any interruption."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinktrain.data import encoding, segments, shards
from sinktrain.data import prepare as module
from sinktrain.data.prepare import PrepareOptions, prepare
from sinktrain.data.registers import HEADER
from sinktrain.data.shards import TokenSplit, read_manifest, verify
from sinktrain.data.sources import Source, documents, is_held_out, pieces
from sinktrain.data.tokenizer import load_tokenizer, train_tokenizer
from sinktrain.errors import ConfigError, DataError, SinktrainError


def book(num_documents: int, paragraphs: int = 12) -> str:
    """Documents of about 1 KB a paragraph, no two paragraphs alike."""
    generator = np.random.default_rng(0)
    words = ["whale", "sea", "ship", "captain", "süß", "日本", "harpoon", "storm", "the", "of", "a"]

    def paragraph() -> str:
        return " ".join(generator.choice(words, 170)) + ".\n\n"

    return "<|doc|>\n".join("".join(paragraph() for _ in range(paragraphs)) for _ in range(num_documents))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(book(8))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def options_for(text: Path, out: Path, **options: Any) -> PrepareOptions:
    if "tokenizer" not in options:
        options.setdefault("vocab_size", 300)
    return PrepareOptions(Source(str(text)), out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(options: PrepareOptions, kind: type[SinktrainError] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        prepare(options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_hold_every_run_of_the_text_ended_by_end_of_text(text: Path, out: Path) -> None:
    manifest = prepare(options_for(text, out))
    tokenizer = load_tokenizer(str(out))
    found = list(documents(Source(str(text))))
    piece_bytes = max(1024, sum(len(document.encode()) for document in found) // 64)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for document in found:
        cut = pieces(document, piece_bytes)
        for held_out, run in itertools.groupby(cut, lambda piece: is_held_out(piece, 0.1)):
            split = "val" if held_out else "train"
            expected[split] += [*tokenizer.encode("".join(run)), tokenizer.eos_token_id]
    for split, ids in expected.items():
        opened = TokenSplit.open(out, split)
        assert opened.read(np.array([0]), opened.num_tokens)[0].tolist() == ids
        assert manifest.splits[split].tokens == len(ids)


def test_manifest_counts_the_text_and_names_its_origin(text: Path, out: Path) -> None:
    manifest = prepare(options_for(text, out))
    counts = manifest.splits
    found = list(documents(Source(str(text))))
    assert counts["train"].text_bytes + counts["val"].text_bytes == sum(len(doc.encode()) for doc in found)
    assert counts["train"].documents == len(found)
    assert 0 < counts["val"].documents < len(found)
    assert manifest.source == {"location": str(text), "files": ["book.txt"]}
    assert (manifest.vocab_size, manifest.padded_vocab_size) == (292, 384)
    assert manifest.val_fraction == 0.1
    assert read_manifest(out) == verify(out) == manifest
    assert sorted(contents(out)) == [
        "manifest.json",
        "tokenizer.json",
        "tokens-train-00000.bin",
        "tokens-val-00000.bin",
    ]


def test_one_long_document_gives_both_splits(tmp_path: Path, out: Path) -> None:
    (tmp_path / "book.txt").write_text(book(1, paragraphs=100))
    manifest = prepare(options_for(tmp_path / "book.txt", out))
    assert manifest.splits["train"].documents == manifest.splits["val"].documents == 1
    assert manifest.splits["val"].pieces > 2


def test_larger_texts_hold_out_less_and_in_larger_pieces(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (64_000, 640_000, 4_000_000, 40_000_000, 400_000_000)
    plans = []
    for size in sizes:
        monkeypatch.setattr(segments, "_measured", lambda source, size=size: size)
        plan = segments.planned(options_for(text, out).source, None)
        plans.append((plan.piece_bytes, plan.val_fraction, plan.text_bytes))
    assert plans == [
        (1024, 0.1, 64_000),
        (10_000, 0.1, 640_000),
        (65_536, 0.1, 4_000_000),
        (65_536, 0.05, 40_000_000),
        (65_536, 0.005, text.stat().st_size),
    ]


def test_tokenizer_learns_from_training_text_alone(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []

    def train(texts: Iterator[str], vocab_size: int) -> Any:
        learned.extend(texts)
        return train_tokenizer(iter(learned), vocab_size)

    monkeypatch.setattr(module, "train_tokenizer", train)
    manifest = prepare(options_for(text, out))
    assert sum(len(piece.encode()) for piece in learned) == manifest.splits["train"].text_bytes
    assert not any(is_held_out(piece, 0.1) for piece in learned)

    learned.clear()
    monkeypatch.setattr(module, "TRAINING_BYTES", 5000)
    prepare(options_for(text, out.with_name("other")))
    assert 5000 <= sum(len(piece.encode()) for piece in learned) < 5000 + 65_536


def test_given_tokenizer_is_kept_as_it_is(text: Path, out: Path, tmp_path: Path) -> None:
    given = train_tokenizer(iter(["some other text"]), vocab_size=300)
    given.save(tmp_path / "tokenizer.json")
    manifest = prepare(options_for(text, out, tokenizer=str(tmp_path)))
    assert manifest.tokenizer_sha256 == load_tokenizer(str(out)).sha256 == given.sha256


def test_number_of_workers_does_not_change_a_byte(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 5000)
    prepare(options_for(text, out, workers=1))
    prepare(options_for(text, out.with_name("pool"), workers=2))
    assert contents(out) == contents(out.with_name("pool"))
    assert "tokens-train-00003.bin" in contents(out)


def test_max_tokens_stops_after_the_part_that_reaches_them(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    whole = prepare(options_for(text, out.with_name("whole")))
    manifest = prepare(options_for(text, out, max_tokens=7000, tokenizer=str(out.with_name("whole"))))
    num_tokens = sum(counts.tokens for counts in manifest.splits.values())
    assert 7000 <= num_tokens < 7000 + 5000
    assert num_tokens < sum(counts.tokens for counts in whole.splits.values()) / 2
    for split in ("train", "val"):
        all_ids = (out.with_name("whole") / f"tokens-{split}-00000.bin").read_bytes()
        assert all_ids.startswith((out / f"tokens-{split}-00000.bin").read_bytes())


def test_finished_folder_is_returned_at_once(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare(options_for(text, out))
    before = contents(out)
    monkeypatch.setattr(segments, "documents", None)  # the text is not read again
    assert prepare(options_for(text, out)) == manifest
    assert f"{out}: already prepared\n" in capsys.readouterr().err
    assert contents(out) == before


def test_finished_folder_with_a_truncated_shard_is_refused(text: Path, out: Path) -> None:
    prepare(options_for(text, out))
    os.truncate(out / "tokens-val-00000.bin", 10)
    assert "tokens-val-00000.bin: the shard has 10 bytes" in refused(options_for(text, out), DataError)


def test_moved_text_is_still_the_same_request(text: Path, out: Path, tmp_path: Path) -> None:
    manifest = prepare(options_for(text, out))
    (tmp_path / "elsewhere").mkdir()
    moved = text.rename(tmp_path / "elsewhere" / "book.txt")
    assert prepare(options_for(moved, out)) == manifest


@pytest.mark.parametrize("is_finished", [True, False])
def test_folder_of_another_request_is_refused_and_kept(
    is_finished: bool, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_finished:
        prepare(options_for(text, out))
    else:
        stop_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            prepare(options_for(text, out))
    before = contents(out)
    holds = "holds shards prepared" if is_finished else "holds a half-finished preparation"
    for change, name in (
        ({"vocab_size": 500}, "--vocab-size"),
        ({"val_fraction": 0.2}, "--val-fraction"),
        ({"max_tokens": 10}, "--max-tokens"),
        ({"streameval_share": 0.1}, "--streameval-share"),
    ):
        message = refused(options_for(text, out, **change))
        assert message == f"--out {out}: {holds} with another {name}; choose another --out"
    message = refused(options_for(text, out, vocab_size=500, max_tokens=10))
    assert "with another --vocab-size and another --max-tokens;" in message
    text.write_text(text.read_text() + "More.")
    assert "with another text, or one that changed since; choose" in refused(options_for(text, out))
    assert contents(out) == before


def test_folder_that_holds_something_else_is_refused_and_kept(text: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    message = refused(options_for(text, out))
    assert message == f"--out {out}: holds something else; choose a new or empty folder"
    (out / "manifest.json").write_text('{"kind": "run"}')
    message = refused(options_for(text, out))
    assert message == f"--out {out}: holds the manifest.json of something else; choose another"
    assert sorted(contents(out)) == ["manifest.json", "thesis.tex"]


def test_file_in_place_of_the_folder_is_refused_and_kept(text: Path, out: Path) -> None:
    out.write_text("years of work")
    assert refused(options_for(text, out)).startswith(f"--out {out}: not a folder that can be used: ")
    assert out.read_text() == "years of work"


def test_unreadable_progress_is_refused(text: Path, out: Path) -> None:
    out.mkdir()
    (out / ".progress.json").write_text("{")
    message = refused(options_for(text, out))
    assert message == f"--out {out}: its .progress.json cannot be read; choose another --out"


def test_two_at_once_in_one_folder_are_refused(text: Path, out: Path) -> None:
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    message = refused(options_for(text, out))
    os.close(handle)
    assert message == f"--out {out}: another sinktrain prepare is writing there"
    prepare(options_for(text, out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "a", "vocab_size": 300}, "--tokenizer takes one as it is, --vocab-size trains one: "),
        ({"val_fraction": 0.0}, "--val-fraction 0.0 must lie between 0 and 1, both excluded"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0 must lie between 0 and 1, both excluded"),
        ({"max_tokens": 0}, "--max-tokens 0 must be 1 or more"),
        ({"workers": 0}, "--workers 0 must be 1 or more"),
        ({"streameval_share": -0.1}, "--streameval-share -0.1 must lie between 0 and 0.5"),
        ({"streameval_share": 0.51}, "--streameval-share 0.51 must lie between 0 and 0.5"),
        ({"streameval_share": math.nan}, "--streameval-share nan must lie between 0 and 0.5"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, text: Path, out: Path
) -> None:
    assert refused(options_for(text, out, **options)).startswith(message)
    assert not out.exists()


def runs_of(folder: Path, split: str) -> list[str]:
    """The texts between end-of-text tokens."""
    tokenizer, opened = load_tokenizer(str(folder)), TokenSplit.open(folder, split)
    ids = opened.read(np.array([0]), opened.num_tokens)[0]
    assert ids[-1] == tokenizer.eos_token_id
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    return [tokenizer.decode(run.tolist()) for run in np.split(ids, ends + 1)[:-1]]


def text_of(runs: list[str]) -> str:
    return "".join(run.removesuffix("<|endoftext|>") for run in runs)


def test_lines_are_documents_between_the_training_text_and_never_held_out(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    without, again = out.with_name("without"), str(out.with_name("without"))
    plain = prepare(options_for(text, without))
    manifest = prepare(options_for(text, out, tokenizer=again, streameval_share=0.5))
    with_lines = runs_of(out, "train")
    lines = [run for run in with_lines if run.startswith(HEADER)]
    rest = [run for run in with_lines if not run.startswith(HEADER)]
    assert text_of(rest) == text_of(runs_of(without, "train"))
    assert contents(out)["tokens-val-00000.bin"] == contents(without)["tokens-val-00000.bin"]
    assert not any("REGISTER" in run for run in (*rest, *runs_of(out, "val")))
    assert len(text_of(lines).encode()) / len(text_of(with_lines).encode()) == pytest.approx(0.5, abs=0.05)
    counts, before = manifest.splits, plain.splits
    assert counts["val"] == before["val"]
    assert counts["train"].pieces == before["train"].pieces
    assert counts["train"].documents == before["train"].documents + len(lines)
    assert counts["train"].text_bytes == len(text_of(with_lines).encode())
    assert manifest.fingerprint != plain.fingerprint
    assert manifest.request["--streameval-share"] == 0.5


def test_share_of_lines_is_met_where_documents_are_shorter_than_they_are(tmp_path: Path, out: Path) -> None:
    documents = "\n<|doc|>\n".join(f"{number} " + 80 * "a word " for number in range(600))
    (tmp_path / "short.txt").write_text(documents)
    prepare(options_for(tmp_path / "short.txt", out, streameval_share=0.2))
    runs = runs_of(out, "train")
    lines = [run for run in runs if run.startswith(HEADER)]
    assert 20 < len(lines) < 120
    assert len(text_of(lines)) / len(text_of(runs)) == pytest.approx(0.2, abs=0.05)


def test_tokenizer_learns_the_lines_too(text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[str] = []

    def train(texts: Iterator[str], vocab_size: int) -> Any:
        learned.extend(texts)
        return train_tokenizer(iter(learned), vocab_size)

    monkeypatch.setattr(module, "train_tokenizer", train)
    prepare(options_for(text, out, streameval_share=0.25))
    lines = [piece for piece in learned if piece.startswith(HEADER)]
    rest = [piece for piece in learned if not piece.startswith(HEADER)]
    share = sum(map(len, lines)) / sum(len(piece.encode()) for piece in learned)
    assert share == pytest.approx(0.25, abs=0.05)
    assert "".join(rest) == text_of([run for run in runs_of(out, "train") if not run.startswith(HEADER)])


def test_lines_do_not_depend_on_workers_or_interruptions(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    whole, pool = out.with_name("whole"), out.with_name("pool")
    prepare(options_for(text, whole, streameval_share=0.3, workers=1))
    prepare(options_for(text, pool, streameval_share=0.3, workers=2))
    for num_tasks in (1, 2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, num_tasks)
            with pytest.raises(KeyboardInterrupt):
                prepare(options_for(text, out, streameval_share=0.3, workers=1))
    message = refused(options_for(text, out, streameval_share=0.2))
    assert message.endswith(
        "holds a half-finished preparation with another --streameval-share; choose another --out"
    )
    prepare(options_for(text, out, streameval_share=0.3, workers=1))
    assert contents(out) == contents(whole) == contents(pool)


def test_no_share_of_lines_is_none(text: Path, out: Path) -> None:
    manifest = prepare(options_for(text, out, streameval_share=0.0))
    assert prepare(options_for(text, out)) == manifest


def test_mistakes_leave_no_folder_behind(text: Path, out: Path) -> None:
    assert "--vocab-size 9 is too small" in refused(options_for(text, out, vocab_size=9), DataError)
    missing = text.with_name("brook.txt")
    assert 'did you mean "book.txt"?' in refused(options_for(missing, out), DataError)
    text.write_bytes(b"\xff")
    assert "not UTF-8 at byte 0" in refused(options_for(text, out), DataError)
    assert not out.exists()


def test_empty_split_is_refused_and_can_be_mended_in_place(text: Path, out: Path) -> None:
    message = refused(options_for(text, out, val_fraction=0.0001), DataError)
    assert message == (
        f"{text}: no held-out text: at --val-fraction 0.0001 all 96 pieces went to the other split;"
        " use a larger --val-fraction"
    )
    message = refused(options_for(text, out, val_fraction=0.9999), DataError)
    assert f"{text}: no training text: at --val-fraction 1 all 96 pieces" in message
    assert message.endswith("use a smaller --val-fraction")
    message = refused(options_for(text, out, max_tokens=1), DataError)
    assert message.endswith("use a larger --val-fraction or a larger --max-tokens")
    assert not out.exists()
    prepare(options_for(text, out))


def stop_after(monkeypatch: pytest.MonkeyPatch, num_tasks: int) -> None:
    """Let the preparation be interrupted when it has written some tasks."""
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    monkeypatch.setattr(module, "SAVE_INTERVAL_S", 0.0)
    encode = encoding._encode
    calls = itertools.count()

    def encode_some(*arguments: Any) -> Any:
        if next(calls) == num_tasks:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(encoding, "_encode", encode_some)


def test_interrupted_and_continued_equals_uninterrupted(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    whole = out.with_name("whole")
    prepare(options_for(text, whole))
    for num_tasks in (0, 1, 2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, num_tasks)
            with pytest.raises(KeyboardInterrupt):
                prepare(options_for(text, out))
        assert not (out / "manifest.json").exists()
    capsys.readouterr()
    prepare(options_for(text, out))
    assert f"{out}: continuing after " in capsys.readouterr().err
    assert contents(out) == contents(whole)


# Prepares a text once, then again and again in forked processes, the n-th of which kills itself at its n-th
# step (a write, a rename, an appended segment); what the same command makes of the rest must be the same.
KILLED_EVERYWHERE = """
import os, pathlib, shutil, signal, sys
from sinktrain import files
from sinktrain.data import prepare as module, segments, shards, sources

text, folder = sys.argv[1], pathlib.Path(sys.argv[2])
segments.TASK_BYTES, module.SAVE_INTERVAL_S, shards.SHARD_TOKENS = 8_000, 0.0, 3_000

def options(out):
    return module.PrepareOptions(sources.Source(text), out, vocab_size=300)

def in_child(work):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def killed_at(step, out):
    left = [step]
    def counted(function):
        def call(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **options)
        return call
    os.replace = counted(os.replace)
    os.fsync = counted(os.fsync)
    shards.ShardWriter.append = counted(shards.ShardWriter.append)
    pathlib.Path.unlink = counted(pathlib.Path.unlink)
    module.prepare(options(out))

def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}

assert in_child(lambda: module.prepare(options(folder / "whole"))) == 0
step, expected = 0, contents(folder / "whole")
while True:
    out = folder / "out"
    status = in_child(lambda: killed_at(step, out))
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert in_child(lambda: module.prepare(options(out))) == 0, f"cannot continue after step {step}"
    assert contents(out) == expected, f"differs after step {step}: {sorted(contents(out))}"
    shutil.rmtree(out)
    step += 1
print(step)
"""


@pytest.mark.slow
def test_killed_at_any_step_and_continued_equals_uninterrupted(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(book(3, paragraphs=9))
    done = subprocess.run(
        [sys.executable, "-c", KILLED_EVERYWHERE, str(text), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


IN_A_POOL = """
import pathlib, sys
from sinktrain.data import prepare as module, segments, sources
if __name__ == "__main__":
    module.POOL_BYTES, segments.TASK_BYTES, module.SAVE_INTERVAL_S = 0, 2_000, 0.0
    source = sources.Source(sys.argv[1])
    module.prepare(module.PrepareOptions(source, pathlib.Path(sys.argv[2]), vocab_size=300, workers=2))
"""


@pytest.mark.slow
def test_killed_with_its_workers_at_work_and_continued_equals_uninterrupted(
    tmp_path: Path, out: Path
) -> None:
    """The workers hold the pipe too: it ends only when they have left with their parent."""
    (tmp_path / "book.txt").write_text(book(30))
    arguments = [sys.executable, "-c", IN_A_POOL, str(tmp_path / "book.txt")]
    process = subprocess.Popen([*arguments, str(out)], stderr=subprocess.PIPE)
    give_up_at = time.monotonic() + 60
    while not (out / ".progress.json").exists() or not tokens_done(out):
        assert process.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "manifest.json").exists()
    subprocess.run([*arguments, str(out)], check=True, stderr=subprocess.DEVNULL)
    prepare(options_for(tmp_path / "book.txt", out.with_name("whole")))
    assert contents(out) == contents(out.with_name("whole"))


def tokens_done(out: Path) -> int:
    content = json.loads((out / ".progress.json").read_text())
    return int(content["counts"]["train"]["tokens"])


def test_killed_worker_is_one_line_and_the_same_command_continues(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    monkeypatch.setattr(segments, "TASK_BYTES", 5000)
    read = segments.documents

    def kill_workers_on_the_way(source: Source, skip: int = 0) -> Iterator[str]:
        for number, document in enumerate(read(source, skip)):
            if number == 6:
                for worker in multiprocessing.active_children():
                    worker.kill()
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(segments, "documents", kill_workers_on_the_way)
        message = refused(options_for(text, out, workers=2), DataError)
    assert message.startswith("a tokenising process was killed, perhaps for lack of memory; the same command")
    prepare(options_for(text, out))
    prepare(options_for(text, out.with_name("whole")))
    assert contents(out) == contents(out.with_name("whole"))


def test_hub_dataset_is_prepared_without_being_measured(
    text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("org/name", subset="en", revision="main")
    local = Source(str(text))
    monkeypatch.setattr(segments, "documents", lambda source, skip=0: documents(local, skip))
    options = dataclasses.replace(options_for(text, out), source=source)
    assert segments.planned(source, None) == segments.Plan(65_536, 0.005, None)
    manifest = prepare(dataclasses.replace(options, val_fraction=0.3, workers=1))
    assert manifest.source == dataclasses.asdict(source)


def test_preparing_imports_no_torch(text: Path, out: Path) -> None:
    script = (
        "import pathlib, sys; from sinktrain.data import prepare as module, sources\n"
        f"source, out = sources.Source({str(text)!r}), pathlib.Path({str(out)!r})\n"
        "module.prepare(module.PrepareOptions(source, out, vocab_size=300))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
