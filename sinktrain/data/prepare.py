"""Text to token shards: pieces go to a split, splits to tokens, tokens to files; cut off, it continues."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from sinktrain.data.shards import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    Shard,
    ShardWriter,
    SplitCounts,
    TokenSplit,
    little_endian,
    read_manifest,
    token_dtype,
)
from sinktrain.data.sources import Source, documents, is_held_out, local_files, pieces, plain_bytes
from sinktrain.data.tokenizer import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from sinktrain.errors import ConfigError, DataError, SinktrainError
from sinktrain.files import write_json
from sinktrain.progress import progress_bar

DEFAULT_VOCAB_SIZE = 16_384
PROGRESS_FILE = ".progress.json"

PIECE_BYTES = 1 << 16
SMALLEST_PIECE_BYTES = 1 << 10
SMALL_TEXT_BYTES = 4_000_000  # a smaller text is cut finer, so that chance gives it both splits
SMALL_TEXT_PIECES = 64

VAL_BYTES = 2_000_000  # held-out text to aim at
VAL_FRACTIONS = (0.005, 0.1)
MEASURED_BYTES = int(VAL_BYTES / VAL_FRACTIONS[0])  # a longer text changes neither pieces nor fraction

TRAINING_BYTES = 256_000_000  # text that a tokenizer learns from
TASK_BYTES = 1 << 20
POOL_BYTES = 8_000_000  # less text is tokenised before worker processes have started
BYTES_PER_TOKEN = 4  # a guess, for sizing work only
SAVE_INTERVAL_S = 2.0


@dataclass(frozen=True)
class PrepareOptions:
    """What ``sinktrain prepare`` was asked for.

    Attributes:
        source: the text.
        out: folder for the shards: new, empty, or left by the same command when it was cut off.
        tokenizer: folder, tokenizer.json or Hub id; None trains one.
        vocab_size: of the tokenizer to train, rows for sinks included; None means ``DEFAULT_VOCAB_SIZE``.
        val_fraction: share of the pieces to hold out; None chooses by the size of the text.
        max_tokens: stop after the document, or MB of a long document, that brings train and val together
            to this many.
        workers: processes; None means one for each CPU. The result does not depend on it.
    """

    source: Source
    out: Path
    tokenizer: str | None = None
    vocab_size: int | None = None
    val_fraction: float | None = None
    max_tokens: int | None = None
    workers: int | None = None


def prepare(options: PrepareOptions) -> Manifest:
    """Tokenise a text into the shards of both splits, or continue where this was cut off.

    Raises:
        ConfigError: options that do not fit together, or an ``out`` that holds something else.
        DataError: a text or tokenizer that cannot be used.
    """
    _check_options(options)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    request = _request(options, given)
    with _locked(options.out):
        if (options.out / MANIFEST_FILE).exists():
            return _finished(options.out, request)
        progress = _resumed(options.out, request) or _begun(options, request)
        try:
            tokenizer = _tokenizer(options, progress.plan, given)
            return _write_shards(options, progress, tokenizer)
        except SinktrainError:
            if progress.num_tokens == 0:
                _discard(options.out)  # the user will mend something, which makes it another request
            raise


# What was asked for


def _check_options(options: PrepareOptions) -> None:
    if options.tokenizer is not None and options.vocab_size is not None:
        raise ConfigError("--tokenizer takes one as it is, --vocab-size trains one: give one of the two")
    if options.vocab_size is not None:
        check_vocab_size(options.vocab_size)
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise ConfigError(f"--val-fraction {options.val_fraction} must lie between 0 and 1, both excluded")
    for name, value in (("--max-tokens", options.max_tokens), ("--workers", options.workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} must be 1 or more")


def _request(options: PrepareOptions, given: Tokenizer | None) -> dict[str, Any]:
    """Return all that decides the tokens, under the names that a message about a difference uses."""
    source = options.source
    if source.is_local:
        files = local_files(source)
        status = [path.stat() for path in files]
        text: list[Any] = [
            [name, stat.st_size, stat.st_mtime_ns]
            for name, stat in zip(_names(source, files), status, strict=True)
        ]
    else:
        text = [source.location, source.subset, source.split, source.revision]
    return {
        "version of sinktrain": FORMAT_VERSION,
        "text, or one that changed since": text,
        "--text-column": source.text_column,
        "--tokenizer": [given.sha256, given.eos_token_id] if given else None,
        "--vocab-size": None if given else options.vocab_size or DEFAULT_VOCAB_SIZE,
        "--val-fraction": options.val_fraction,
        "--max-tokens": options.max_tokens,
    }


def _names(source: Source, files: list[Path]) -> list[str]:
    folder = Path(source.location).expanduser()
    return [path.relative_to(folder).as_posix() if path != folder else path.name for path in files]


def _described(source: Source) -> dict[str, Any]:
    """Return what the manifest says about the origin of the text."""
    if source.is_local:
        return {"location": source.location, "files": _names(source, local_files(source))}
    return asdict(source)


@dataclass(frozen=True)
class _Plan:
    """Sizes that follow from the text, chosen once."""

    piece_bytes: int
    val_fraction: float
    text_bytes: int | None  # of all documents, where that is nearly known


def _planned(options: PrepareOptions) -> _Plan:
    if not options.source.is_local:
        return _Plan(PIECE_BYTES, options.val_fraction or VAL_FRACTIONS[0], None)
    measured = _measured(options.source)
    piece_bytes = PIECE_BYTES
    if measured < SMALL_TEXT_BYTES:
        piece_bytes = max(SMALLEST_PIECE_BYTES, measured // SMALL_TEXT_PIECES)
    smallest, largest = VAL_FRACTIONS
    val_fraction = options.val_fraction or min(max(VAL_BYTES / measured, smallest), largest)
    text_bytes = measured if measured < MEASURED_BYTES else plain_bytes(options.source)
    return _Plan(piece_bytes, val_fraction, text_bytes)


def _measured(source: Source) -> int:
    """Return the UTF-8 bytes of the documents, counted up to ``MEASURED_BYTES``."""
    with progress_bar(desc="measuring the text", unit="B", unit_scale=True) as bar:
        size = 0
        for document in documents(source):
            num_bytes = len(document.encode())
            size += num_bytes
            bar.update(num_bytes)
            if size >= MEASURED_BYTES:
                break
    return size


# The folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder; one that was made here and stays empty is taken away."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--out {folder}: not a folder that can be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {folder}: another sinktrain prepare is writing there") from None
        yield
    finally:
        os.close(handle)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _finished(folder: Path, request: dict[str, Any]) -> Manifest:
    try:
        manifest = read_manifest(folder)
    except DataError:
        raise ConfigError(
            f"--out {folder}: holds the manifest.json of something else; choose another"
        ) from None
    _check_same(folder, request, manifest.request, "holds shards prepared")
    for split in SPLITS:
        TokenSplit.open(folder, split)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    print(f"{folder}: already prepared", file=sys.stderr)
    return manifest


def _resumed(folder: Path, request: dict[str, Any]) -> _Progress | None:
    if not (folder / PROGRESS_FILE).exists():
        return None
    progress = _Progress.read(folder)
    _check_same(folder, request, progress.request, "holds a half-finished preparation")
    if progress.num_tokens:
        print(f"{folder}: continuing after {progress.num_tokens:,} tokens", file=sys.stderr)
    return progress


def _begun(options: PrepareOptions, request: dict[str, Any]) -> _Progress:
    if any(not _is_leftover(path) for path in options.out.iterdir()):
        raise ConfigError(f"--out {options.out}: holds something else; choose a new or empty folder")
    progress = _Progress(request, _planned(options))
    progress.save(options.out)
    return progress


def _check_same(folder: Path, request: dict[str, Any], other: dict[str, Any], holds: str) -> None:
    differing = [name for name in request if request[name] != other.get(name)]
    if differing:
        raise ConfigError(
            f"--out {folder}: {holds} with another {' and another '.join(differing)}; choose another --out"
        )


def _is_leftover(path: Path) -> bool:
    """Whether this is what remains of an atomic write that was cut off."""
    return re.fullmatch(r"\..*\.tmp-\d+", path.name) is not None


def _discard(folder: Path) -> None:
    """Remove what a preparation wrote. Only for a folder that ``_begun`` found empty."""
    ours = {PROGRESS_FILE, TOKENIZER_FILE, CONFIG_FILE}
    for path in folder.iterdir():
        if path.name in ours or _is_leftover(path) or re.fullmatch(r"\.?tokens-.*\.bin(\.part)?", path.name):
            path.unlink()


@dataclass
class _Progress:
    """How far a preparation has come, as ``.progress.json`` keeps it."""

    request: dict[str, Any]
    plan: _Plan
    document: int = 0  # the next segment: its document
    part: int = 0  # and its number within that
    counts: dict[str, SplitCounts] = field(default_factory=lambda: {split: SplitCounts() for split in SPLITS})
    shards: list[Shard] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())

    @property
    def text_bytes(self) -> int:
        return sum(counts.text_bytes for counts in self.counts.values())

    @classmethod
    def read(cls, folder: Path) -> _Progress:
        try:
            content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            return cls(
                **content
                | {
                    "plan": _Plan(**content["plan"]),
                    "counts": {split: SplitCounts(**content["counts"][split]) for split in SPLITS},
                    "shards": [Shard(**shard) for shard in content["shards"]],
                }
            )
        except (OSError, ValueError, TypeError, KeyError):
            raise ConfigError(
                f"--out {folder}: its {PROGRESS_FILE} cannot be read; choose another --out"
            ) from None

    def save(self, folder: Path) -> None:
        write_json(folder / PROGRESS_FILE, asdict(self))


# The tokenizer


def _tokenizer(options: PrepareOptions, plan: _Plan, given: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of the folder, put there now if it is not there yet."""
    path = options.out / TOKENIZER_FILE
    if path.exists():
        return load_tokenizer(str(options.out))
    tokenizer = given or _trained(options, plan)
    tokenizer.save(path)
    return tokenizer


def _trained(options: PrepareOptions, plan: _Plan) -> Tokenizer:
    limit = TRAINING_BYTES
    if options.max_tokens:  # do not fetch far more than was asked for
        limit = min(limit, 2 * BYTES_PER_TOKEN * options.max_tokens)
    total = min(limit, plan.text_bytes or limit)
    with progress_bar(total=total, desc="training the tokenizer", unit="B", unit_scale=True) as bar:
        texts = _training_pieces(options.source, plan, limit, bar)
        return train_tokenizer(texts, options.vocab_size or DEFAULT_VOCAB_SIZE)


def _training_pieces(source: Source, plan: _Plan, limit: int, bar: tqdm[Any]) -> Iterator[str]:
    num_bytes = 0
    for document in documents(source):
        for piece in pieces(document, plan.piece_bytes):
            if is_held_out(piece, plan.val_fraction):
                continue
            yield piece
            num_bytes += len(piece.encode())
            bar.update(len(piece.encode()))
            if num_bytes >= limit:
                return


# Segments: what is tokenised in one go


@dataclass(frozen=True)
class _Segment:
    """Consecutive pieces of one document and one split."""

    split: str
    text: str
    num_pieces: int
    document: int
    part: int  # number within the document
    is_first: bool  # of its split in its document
    ends_run: bool  # the next text is of another split or document


def _segments(source: Source, progress: _Progress) -> Iterator[_Segment]:
    """Yield what is still to be tokenised."""
    first = (progress.document, progress.part)
    for number, document in enumerate(documents(source, skip=progress.document), start=progress.document):
        for segment in _document_segments(number, document, progress.plan):
            if (segment.document, segment.part) >= first:
                yield segment


def _document_segments(number: int, document: str, plan: _Plan) -> Iterator[_Segment]:
    """Yield the runs of a document, a long run in parts of at most ``TASK_BYTES``."""
    pieces_at_once = max(1, TASK_BYTES // plan.piece_bytes)
    part = 0
    seen: set[str] = set()
    cut = pieces(document, plan.piece_bytes)
    for held_out, group in itertools.groupby(cut, lambda piece: is_held_out(piece, plan.val_fraction)):
        split = "val" if held_out else "train"
        run = list(group)
        for begin in range(0, len(run), pieces_at_once):
            end = begin + pieces_at_once
            batch = run[begin:end]
            is_first = split not in seen
            yield _Segment(
                split, "".join(batch), len(batch), number, part, is_first, ends_run=end >= len(run)
            )
            seen.add(split)
            part += 1


def _tasks(segments: Iterator[_Segment]) -> Iterator[list[_Segment]]:
    """Group segments into work for a process: a task ends when it reaches ``TASK_BYTES``."""
    task: list[_Segment] = []
    size = 0
    for segment in segments:
        task.append(segment)
        size += len(segment.text)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


# Tokenising

Ids = npt.NDArray[Any]
_worker_tokenizer: Tokenizer


def _encoded(
    tasks: Iterator[list[_Segment]], folder: Path, tokenizer: Tokenizer, workers: int
) -> Generator[tuple[list[_Segment], list[Ids]], None, None]:
    """Yield each task with the ids of its segments, in order; reads only a few tasks ahead."""
    if workers == 1:
        yield from ((task, _encode(tokenizer, task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(folder),)
    )
    pending: deque[tuple[list[_Segment], Future[list[Ids]]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(_encode_in_worker, task)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        yield from ((done, future.result()) for done, future in pending)
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was killed, perhaps for lack of memory; the same command continues,"
            " fewer --workers take less"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(tokenizer: Tokenizer, task: list[_Segment]) -> list[Ids]:
    dtype = little_endian(token_dtype(tokenizer.vocab_size))
    end = [tokenizer.eos_token_id]
    encoded = tokenizer.encode_batch([segment.text for segment in task])
    return [
        np.array(ids + end if segment.ends_run else ids, dtype=dtype)
        for segment, ids in zip(task, encoded, strict=True)
    ]


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    for stop in (signal.SIGINT, signal.SIGTERM):  # a whole group gets them; they are the parent's to answer
        signal.signal(stop, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each CPU
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(folder)


def _leave_with_parent() -> None:
    """End this process with its parent, which a pool does not do when the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(task: list[_Segment]) -> list[Ids]:
    return _encode(_worker_tokenizer, task)


def _num_workers(options: PrepareOptions, plan: _Plan) -> int:
    sizes = (plan.text_bytes, options.max_tokens and BYTES_PER_TOKEN * options.max_tokens)
    if min((size for size in sizes if size), default=POOL_BYTES) < POOL_BYTES:
        return 1
    if options.workers:
        return options.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Writing


def _write_shards(options: PrepareOptions, progress: _Progress, tokenizer: Tokenizer) -> Manifest:
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        split: ShardWriter(options.out, split, dtype, progress.counts[split].tokens, progress.shards)
        for split in SPLITS
    }
    try:
        _write_tokens(options, progress, tokenizer, writers)
        _check_both_splits(options, progress)
        for writer in writers.values():
            writer.finish_shard()
    finally:
        for writer in writers.values():
            writer.close()
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.padded_vocab_size,
        sink_token_ids=tokenizer.sink_token_ids,
        eos_token_id=tokenizer.eos_token_id,
        dtype=dtype,
        shards=tuple(shard for writer in writers.values() for shard in writer.shards),
        splits=progress.counts,
        source=_described(options.source),
        val_fraction=progress.plan.val_fraction,
        request=progress.request,
    )
    manifest.save(options.out)
    for path in options.out.iterdir():
        if path.name == PROGRESS_FILE or _is_leftover(path):
            path.unlink()
    return manifest


def _write_tokens(
    options: PrepareOptions, progress: _Progress, tokenizer: Tokenizer, writers: dict[str, ShardWriter]
) -> None:
    """Tokenise the rest of the text into the open parts, and save the progress now and then."""
    max_tokens = options.max_tokens or math.inf
    saved_at = time.monotonic()
    num_shards = len(progress.shards)
    tasks = _tasks(_segments(options.source, progress))
    workers = _num_workers(options, progress.plan)
    with closing(_encoded(tasks, options.out, tokenizer, workers)) as encoded, _Bar(options, progress) as bar:
        while progress.num_tokens < max_tokens and (done := next(encoded, None)):
            for segment, ids in zip(*done, strict=True):
                writers[segment.split].append(ids)
                _count(progress, segment, ids)
                if progress.num_tokens >= max_tokens:
                    break
            bar.show()
            progress.shards = [shard for writer in writers.values() for shard in writer.shards]
            if len(progress.shards) > num_shards or time.monotonic() - saved_at > SAVE_INTERVAL_S:
                for writer in writers.values():
                    writer.flush()
                progress.save(options.out)
                saved_at, num_shards = time.monotonic(), len(progress.shards)


def _count(progress: _Progress, segment: _Segment, ids: Ids) -> None:
    counts = progress.counts[segment.split]
    counts.tokens += len(ids)
    counts.documents += segment.is_first
    counts.pieces += segment.num_pieces
    counts.text_bytes += len(segment.text.encode())
    progress.document, progress.part = segment.document, segment.part + 1


def _check_both_splits(options: PrepareOptions, progress: _Progress) -> None:
    for split, name, change in (("train", "training", "smaller"), ("val", "held-out", "larger")):
        if progress.counts[split].tokens == 0:
            num_pieces = sum(counts.pieces for counts in progress.counts.values())
            _discard(options.out)
            fraction = f"{progress.plan.val_fraction:.3g}"
            raise DataError(
                f"{options.source.location}: no {name} text: at --val-fraction {fraction}"
                f" all {num_pieces} pieces went to the other split; use a {change} --val-fraction"
                + (" or a larger --max-tokens" if options.max_tokens else "")
            )


class _Bar:
    """Progress in bytes of text, with documents/s."""

    def __init__(self, options: PrepareOptions, progress: _Progress) -> None:
        self.max_tokens = options.max_tokens
        self.progress = progress
        self.first_document = progress.document
        self.bar = progress_bar(
            total=progress.plan.text_bytes,
            initial=progress.text_bytes,
            desc="tokenising",
            unit="B",
            unit_scale=True,
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self) -> None:
        progress, bar = self.progress, self.bar
        if self.max_tokens:
            expected = round(self.max_tokens * progress.text_bytes / progress.num_tokens)
            bar.total = min(expected, progress.plan.text_bytes or expected)
        documents_per_s = (progress.document - self.first_document) / bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{documents_per_s:,.0f} documents/s", refresh=False)
        bar.update(progress.text_bytes - bar.n)
