"""Text to token shards: pieces go to a split, splits to tokens, tokens to files; cut off, it continues."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sinktrain.data.encoding import Ids, encoded, num_cpus
from sinktrain.data.registers import training_documents
from sinktrain.data.resuming import Progress, discard, finished, forget_progress, locked, resumed
from sinktrain.data.segments import Plan, Segment, planned, tasks, training_pieces
from sinktrain.data.shards import FORMAT_VERSION, MANIFEST_FILE, SPLITS, Manifest, ShardWriter, token_dtype
from sinktrain.data.sources import Source, local_files
from sinktrain.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from sinktrain.errors import ConfigError, DataError, SinktrainError
from sinktrain.progress import progress_bar

DEFAULT_VOCAB_SIZE = 16_384
TRAINING_BYTES = 256_000_000  # text that a tokenizer learns from
POOL_BYTES = 8_000_000  # less text is tokenised before worker processes have started
BYTES_PER_TOKEN = 4  # a guess, for sizing work only
SAVE_INTERVAL_S = 2.0
LARGEST_STREAMEVAL_SHARE = 0.5


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
        streameval_share: share of the training text, in bytes, to be lines of StreamEval's form, which are
            mixed in; the held-out text gets none.
    """

    source: Source
    out: Path
    tokenizer: str | None = None
    vocab_size: int | None = None
    val_fraction: float | None = None
    max_tokens: int | None = None
    workers: int | None = None
    streameval_share: float | None = None


def prepare(options: PrepareOptions) -> Manifest:
    """Tokenise a text into the shards of both splits, or continue where this was cut off.

    Raises:
        ConfigError: options that do not fit together, or an ``out`` that holds something else.
        DataError: a text or tokenizer that cannot be used.
    """
    _check_options(options)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    request = _request(options, given)
    with locked(options.out):
        if (options.out / MANIFEST_FILE).exists():
            return finished(options.out, request)
        progress = resumed(options.out, request) or _begun(options, request)
        try:
            tokenizer = _tokenizer(options, progress.plan, given)
            return _write_shards(options, progress, tokenizer)
        except SinktrainError:
            if progress.num_tokens == 0:
                discard(options.out)  # the user will mend something, which makes it another request
            raise


def _begun(options: PrepareOptions, request: dict[str, Any]) -> Progress:
    progress = Progress(request, planned(options.source, options.val_fraction))
    progress.save(options.out)
    return progress


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
    if not 0 <= (options.streameval_share or 0) <= LARGEST_STREAMEVAL_SHARE:
        raise ConfigError(
            f"--streameval-share {options.streameval_share} must lie between 0 and {LARGEST_STREAMEVAL_SHARE}"
        )


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
        "--streameval-share": options.streameval_share or None,
    }


def _names(source: Source, files: list[Path]) -> list[str]:
    folder = Path(source.location).expanduser()
    return [path.relative_to(folder).as_posix() if path != folder else path.name for path in files]


def _described(source: Source) -> dict[str, Any]:
    """Return what the manifest says about the origin of the text."""
    if source.is_local:
        return {"location": source.location, "files": _names(source, local_files(source))}
    return asdict(source)


# The tokenizer


def _tokenizer(options: PrepareOptions, plan: Plan, given: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of the folder, put there now if it is not there yet."""
    path = options.out / TOKENIZER_FILE
    if path.exists():
        return load_tokenizer(str(options.out))
    tokenizer = given or _trained(options, plan)
    tokenizer.save(path)
    return tokenizer


def _trained(options: PrepareOptions, plan: Plan) -> Tokenizer:
    limit = TRAINING_BYTES
    if options.max_tokens:  # do not fetch far more than was asked for
        limit = min(limit, 2 * BYTES_PER_TOKEN * options.max_tokens)
    total = min(limit, _total_bytes(plan, options.streameval_share) or limit)
    with progress_bar(total=total, desc="training the tokenizer", unit="B", unit_scale=True) as bar:
        texts = training_pieces(options.source, plan)
        if options.streameval_share:
            texts = _and_lines(texts, options.streameval_share)
        return train_tokenizer(_shown_up_to(limit, texts, bar), options.vocab_size or DEFAULT_VOCAB_SIZE)


def _shown_up_to(limit: int, texts: Iterator[str], bar: tqdm[Any]) -> Iterator[str]:
    """Yield texts until they have ``limit`` bytes, with progress."""
    num_bytes = 0
    for text in texts:
        yield text
        num_bytes += len(text.encode())
        bar.update(num_bytes - bar.n)
        if num_bytes >= limit:
            return


# StreamEval's lines. Which go with a piece of text depends on its place alone, so work may begin anywhere.


def _and_lines(pieces: Iterator[str], share: float) -> Iterator[str]:
    """Yield what the tokenizer learns from: pieces of text, and after each the lines that go with it."""
    for number, piece in enumerate(pieces):
        yield piece
        yield from training_documents(len(piece.encode()), share, key=(number,))


def _with_lines(task: list[Segment], share: float) -> list[Segment]:
    """Put documents of lines behind the training segments of a task, as if they stood in the text there."""
    mixed: list[Segment] = []
    for segment in task:
        documents: list[str] = []
        if segment.split == "train":
            num_bytes = len(segment.text.encode())
            documents = training_documents(num_bytes, share, key=(segment.document, segment.part))
        mixed.append(replace(segment, ends_run=segment.ends_run or bool(documents)))
        mixed += [
            replace(segment, text=text, num_pieces=0, is_first=True, ends_run=True) for text in documents
        ]
    return mixed


def _total_bytes(plan: Plan, share: float | None) -> int | None:
    """Return about how many bytes of text and lines there are, where that is known."""
    return plan.text_bytes and round(plan.text_bytes / (1 - (share or 0)))


# Writing


def _write_shards(options: PrepareOptions, progress: Progress, tokenizer: Tokenizer) -> Manifest:
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
    forget_progress(options.out)
    return manifest


def _write_tokens(
    options: PrepareOptions, progress: Progress, tokenizer: Tokenizer, writers: dict[str, ShardWriter]
) -> None:
    """Tokenise the rest of the text into the open parts, and save the progress now and then."""
    max_tokens = options.max_tokens or math.inf
    saved_at, num_shards = time.monotonic(), len(progress.shards)
    first_document = progress.document
    todo = tasks(options.source, progress.plan, progress.document, progress.part)
    if share := options.streameval_share:
        todo = (_with_lines(task, share) for task in todo)
    workers = _num_workers(options, progress.plan)
    with closing(encoded(todo, options.out, tokenizer, workers)) as done, _bar(options, progress) as bar:
        while progress.num_tokens < max_tokens and (task := next(done, None)):
            for segment, ids in zip(*task, strict=True):
                writers[segment.split].append(ids)
                _count(progress, segment, ids)
                if progress.num_tokens >= max_tokens:
                    break
            _show(bar, options, progress, progress.document - first_document)
            progress.shards = [shard for writer in writers.values() for shard in writer.shards]
            if len(progress.shards) > num_shards or time.monotonic() - saved_at > SAVE_INTERVAL_S:
                for writer in writers.values():
                    writer.flush()
                progress.save(options.out)
                saved_at, num_shards = time.monotonic(), len(progress.shards)


def _num_workers(options: PrepareOptions, plan: Plan) -> int:
    sizes = (plan.text_bytes, options.max_tokens and BYTES_PER_TOKEN * options.max_tokens)
    if min((size for size in sizes if size), default=POOL_BYTES) < POOL_BYTES:
        return 1
    return options.workers or num_cpus()


def _count(progress: Progress, segment: Segment, ids: Ids) -> None:
    counts = progress.counts[segment.split]
    counts.tokens += len(ids)
    counts.documents += segment.is_first
    counts.pieces += segment.num_pieces
    counts.text_bytes += len(segment.text.encode())
    progress.document, progress.part = segment.document, segment.part + 1


def _check_both_splits(options: PrepareOptions, progress: Progress) -> None:
    for split, name, change in (("train", "training", "smaller"), ("val", "held-out", "larger")):
        if progress.counts[split].tokens == 0:
            num_pieces = sum(counts.pieces for counts in progress.counts.values())
            discard(options.out)
            fraction = f"{progress.plan.val_fraction:.3g}"
            raise DataError(
                f"{options.source.location}: no {name} text: at --val-fraction {fraction}"
                f" all {num_pieces} pieces went to the other split; use a {change} --val-fraction"
                + (" or a larger --max-tokens" if options.max_tokens else "")
            )


# The progress bar: bytes of text, with documents/s


def _bar(options: PrepareOptions, progress: Progress) -> tqdm[Any]:
    total, done = _total_bytes(progress.plan, options.streameval_share), progress.text_bytes
    return progress_bar(total=total, initial=done, desc="tokenising", unit="B", unit_scale=True)


def _show(bar: tqdm[Any], options: PrepareOptions, progress: Progress, num_documents: int) -> None:
    if options.max_tokens:
        expected = round(options.max_tokens * progress.text_bytes / progress.num_tokens)
        bar.total = min(expected, _total_bytes(progress.plan, options.streameval_share) or expected)
    documents_per_s = num_documents / bar.format_dict["elapsed"]
    bar.set_postfix_str(f"{documents_per_s:,.0f} documents/s", refresh=False)
    bar.update(progress.text_bytes - bar.n)
