"""A checkpoint as a file: written straight to disk, and checked record by record before it is trusted."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from sinktrain.errors import ModelError, first_line

READ_AT_ONCE = 1 << 20


class CheckpointFile(TorchCheckpointIO):
    """Writes where it is told to. Lightning 2.6.6's own makes a copy in memory and another in ``$TMPDIR``.

    While training goes on, the process that writes holds the state in host memory a second time: 12 bytes
    a parameter under AdamW, freed when the file is whole. The memory is not pinned: that would copy faster
    the second time, but pinning takes as long as the first copy, and is never undone.

    ``num_bytes`` is the size of the tensors that were last written, or that there was no space for.
    ``are_copies`` are the keys of a checkpoint under which tensors are copies on the CPU already.
    """

    num_bytes = 0
    are_copies: frozenset[str] = frozenset()
    _writing: Future[None] | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Callable[[], None] | None = None,
    ) -> None:
        """Write the file and flush it to disk.

        Args:
            storage_options: called when the file is on disk. The writing is then in the background, from a
                copy, so that training may go on, and ``wait`` says how it went. One at a time.

        Raises:
            OSError: it could not be written; what there was of it is gone.
        """
        self.num_bytes = _tensor_bytes(checkpoint)
        if storage_options is None:
            self._write(checkpoint, Path(path))
            return
        assert self._writing is None, "wait for the file before"
        copied = {
            key: apply_to_collection(value, Tensor, Tensor.detach if key in self.are_copies else copy_on_host)
            for key, value in checkpoint.items()
        }
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing = writer.submit(self._write, copied, Path(path), storage_options)
        writer.shutdown(wait=False)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: what was written in the background could not be; what there was of it is gone.
        """
        if self._writing is not None:
            problem = self._writing.exception()
            self._writing = None
            if problem is not None:
                raise problem

    def _write(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], None] | None = None) -> None:
        try:
            if 0 < shutil.disk_usage(path.parent).free < self.num_bytes:  # 0 where it is not known
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # or others could not write meanwhile
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            raise _cause(error, path) from error
        if then is not None:
            then()


def copy_on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def check_whole(path: Path) -> None:
    """Read every record of a checkpoint and compare it with the CRC-32 that was written with it.

    That finds a file that is cut short and any changed byte that loading would read, but not an edit
    that brings its own CRC. It takes about as long as reading the file: a second for 2 GB in memory.

    Raises:
        ModelError: the file is damaged or cannot be read.
    """
    num_threads = min(8, os.cpu_count() or 1)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [record.filename for record in sorted(archive.infolist(), key=_size)]
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda start: _read_all(path, names[start::num_threads]), range(num_threads)))
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}") from None


def _size(record: zipfile.ZipInfo) -> int:
    return record.file_size


def _read_all(path: Path, names: list[str]) -> None:
    """Read these records; ``zipfile`` compares their CRCs at their ends."""
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(name) as record:
                while record.read(READ_AT_ONCE):
                    pass


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def _cause(error: BaseException, path: str | Path) -> OSError | RuntimeError:
    """The error of the disk that torch turned into a RuntimeError of its own, where there is one."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, OSError):
            return OSError(known.errno, known.strerror, str(path))
        known = known.__context__
    assert isinstance(error, RuntimeError)
    return error
