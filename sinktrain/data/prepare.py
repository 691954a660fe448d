"""Text to token shards: pieces go to a split, splits to tokens, tokens to files; cut off, it continues."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sinktrain.data.encoding import Ids, encoded, num_cpus
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
    total = min(limit, plan.text_bytes or limit)
    with progress_bar(total=total, desc="training the tokenizer", unit="B", unit_scale=True) as bar:
        texts = _shown_up_to(limit, training_pieces(options.source, plan), bar)
        return train_tokenizer(texts, options.vocab_size or DEFAULT_VOCAB_SIZE)


def _shown_up_to(limit: int, texts: Iterator[str], bar: tqdm[Any]) -> Iterator[str]:
    """Yield texts until they have ``limit`` bytes, with progress."""
    num_bytes = 0
    for text in texts:
        yield text
        num_bytes += len(text.encode())
        bar.update(num_bytes - bar.n)
        if num_bytes >= limit:
            return


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
    workers = _num_workers(options, progress.plan)
    with closing(encoded(todo, options.out, tokenizer, workers)) as done, _bar(progress) as bar:
        while progress.num_tokens < max_tokens and (task := next(done, None)):
            for segment, ids in zip(*task, strict=True):
                writers[segment.split].append(ids)
                _count(progress, segment, ids)
                if progress.num_tokens >= max_tokens:
                    break
            _show(bar, progress, options.max_tokens, progress.document - first_document)
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


def _bar(progress: Progress) -> tqdm[Any]:
    total, done = progress.plan.text_bytes, progress.text_bytes
    return progress_bar(total=total, initial=done, desc="tokenising", unit="B", unit_scale=True)


def _show(bar: tqdm[Any], progress: Progress, max_tokens: int | None, num_documents: int) -> None:
    if max_tokens:
        expected = round(max_tokens * progress.text_bytes / progress.num_tokens)
        bar.total = min(expected, progress.plan.text_bytes or expected)
    documents_per_s = num_documents / bar.format_dict["elapsed"]
    bar.set_postfix_str(f"{documents_per_s:,.0f} documents/s", refresh=False)
    bar.update(progress.text_bytes - bar.n)
