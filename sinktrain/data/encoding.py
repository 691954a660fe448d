"""Segments to token ids, in this process or in a pool of them that outlives neither parent nor error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sinktrain.data.segments import Segment
from sinktrain.data.shards import little_endian, token_dtype
from sinktrain.data.tokenizer import Tokenizer, load_tokenizer
from sinktrain.errors import DataError

Ids = npt.NDArray[Any]
_worker_tokenizer: Tokenizer


def encoded(
    tasks: Iterator[list[Segment]], folder: Path, tokenizer: Tokenizer, workers: int
) -> Generator[tuple[list[Segment], list[Ids]], None, None]:
    """Yield each task with the ids of its segments, in order; reads only a few tasks ahead.

    Args:
        tasks: work for a process each.
        folder: holds the tokenizer, for worker processes.
        tokenizer: the same one.
        workers: processes; 1 means this one.

    Yields:
        A task, and for each of its segments uint16[token] or uint32[token], little-endian, ended by
        end-of-text where the segment ends its run.

    Raises:
        DataError: a worker process was killed.
    """
    if workers == 1:
        yield from ((task, _encode(tokenizer, task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(folder),)
    )
    pending: deque[tuple[list[Segment], Future[list[Ids]]]] = deque()
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


def num_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode(tokenizer: Tokenizer, task: list[Segment]) -> list[Ids]:
    dtype = little_endian(token_dtype(tokenizer.vocab_size))
    end = [tokenizer.eos_token_id]
    all_ids = tokenizer.encode_batch([segment.text for segment in task])
    return [
        np.array(ids + end if segment.ends_run else ids, dtype=dtype)
        for segment, ids in zip(task, all_ids, strict=True)
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


def _encode_in_worker(task: list[Segment]) -> list[Ids]:
    return _encode(_worker_tokenizer, task)
