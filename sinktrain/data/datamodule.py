"""Shards to batches: each rank's share of every global batch, read ahead by a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from sinktrain.data.shards import Manifest, TokenSplit, read_manifest
from sinktrain.data.tokenizer import RESERVED_SINKS
from sinktrain.data.windows import num_windows, window_order
from sinktrain.errors import ConfigError, DataError


class WindowData(pl.LightningDataModule):
    """Windows of prepared shards, in an order that depends on the seed alone.

    Args:
        path: shards, made by ``sinktrain prepare``.
        seq_len: tokens of a sample, sinks included.
        global_batch: samples of an optimizer step, over all devices.
        micro_batch: samples that a device computes at once; gradients accumulate over the rest of
            its share. The whole share when null.
        score_sink: score the (last) sink's prediction of the first token.
        val_windows: held-out samples scored at each validation; all there are when null.
        seed: of the order; ``seed_everything``.
    """

    def __init__(
        self,
        path: str,
        seq_len: int = 2048,
        global_batch: int = 32,
        micro_batch: int | None = None,
        score_sink: bool = True,
        val_windows: int | None = 256,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if seq_len <= RESERVED_SINKS:
            raise ConfigError(
                f"data.seq_len is {seq_len}; use more than {RESERVED_SINKS}, which sinks may take"
            )
        if global_batch < 1 or (micro_batch is not None and micro_batch < 1):
            raise ConfigError(
                f"data.global_batch {global_batch} and data.micro_batch {micro_batch} must be 1 or more"
            )
        if val_windows is not None and val_windows < 1:
            raise ConfigError(f"data.val_windows is {val_windows}; use 1 or more, or null for all")
        self.path = Path(path)
        self.seq_len = seq_len
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.score_sink = score_sink
        self.val_windows = val_windows
        self.seed = seed
        self.manifest: Manifest = read_manifest(self.path)
        self.loader: WindowLoader | None = None
        self._first_step = 0
        self._first_sample = 0

    def share(self, world_size: int) -> int:
        """Samples of each device in a global batch.

        Raises:
            ConfigError: the global batch does not divide into devices and micro-batches.
        """
        unit = world_size * (self.micro_batch or 1)
        if self.global_batch % unit:
            raise ConfigError(
                f"data.global_batch {self.global_batch} does not divide into {world_size} devices "
                f"x micro-batches of {self.micro_batch or 1}; use a multiple of {unit}"
            )
        return self.global_batch // world_size

    @property
    def rows_at_once(self) -> int:
        """Samples that a device computes at once."""
        return self.micro_batch or self.share(self._world_size)

    @property
    def samples_consumed(self) -> int:
        """Samples that training has taken, over all devices, in this run and those it continues."""
        steps = self.trainer.global_step - self._first_step if self.trainer else 0
        return self._first_sample + steps * self.global_batch

    def train_dataloader(self) -> WindowLoader:
        train = self._open("train")
        self.loader = WindowLoader(
            train,
            self.seq_len,
            self.seed,
            first_sample=self._first_sample + self._rank * self.share(self._world_size),
            rows=self.share(self._world_size),
            stride=self.global_batch,
            pin_memory=torch.cuda.is_available(),
        )
        return self.loader

    def val_dataloader(self) -> HeldOutLoader:
        return HeldOutLoader(
            self._open("val"), self.seq_len, self.val_windows, self.rows_at_once, self._rank, self._world_size
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples_consumed": self.samples_consumed,
            "global_step": self.trainer.global_step if self.trainer else 0,
            "seed": self.seed,
            "fingerprint": self.manifest.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["fingerprint"] != self.manifest.fingerprint:
            raise DataError(
                f"{self.path} is not the corpus that this checkpoint was trained on; "
                "pass its shards, or --resume none"
            )
        if state_dict["seed"] != self.seed:
            raise ConfigError(
                f"seed_everything is {self.seed} but the checkpoint's data order has seed "
                f"{state_dict['seed']}; pass --seed_everything {state_dict['seed']}"
            )
        self._first_sample = state_dict["samples_consumed"]
        self._first_step = state_dict["global_step"]

    def teardown(self, stage: str) -> None:
        if self.loader is not None:
            self.loader.close()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _open(self, split: str) -> TokenSplit:
        tokens = TokenSplit.open(self.path, split)
        if num_windows(tokens.num_tokens, self.seq_len) == 0:
            raise DataError(
                f"{self.path}: the {split} split holds {tokens.num_tokens} tokens, less than one sample of "
                f"data.seq_len {self.seq_len} + 1; use a shorter seq_len or more text"
            )
        return tokens


class WindowLoader:
    """Endless batches int64[rows, seq + 1]: samples first, first + 1, …, then the same a stride later."""

    def __init__(
        self,
        tokens: TokenSplit,
        seq_len: int,
        seed: int,
        first_sample: int,
        rows: int,
        stride: int,
        pin_memory: bool = False,
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.first_sample = first_sample
        self.rows = rows
        self.stride = stride
        self.pin_memory = pin_memory
        self.wait_s = 0.0
        """Seconds that training has waited for batches."""
        self._stop = threading.Event()
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(maxsize=4)
        self._reader: threading.Thread | None = None

    def batch(self, number: int) -> Tensor:
        """The batch that is ``number`` strides after the first."""
        total = num_windows(self.tokens.num_tokens, self.seq_len)
        first = self.first_sample + number * self.stride
        order = window_order(first, self.rows, total, self.seed)
        windows = torch.from_numpy(self.tokens.read(order * self.seq_len, self.seq_len + 1))
        return windows.pin_memory() if self.pin_memory else windows

    def __iter__(self) -> Iterator[Tensor]:
        self.close()
        stop = self._stop = threading.Event()
        ready = self._ready = queue.Queue(maxsize=4)
        self._reader = threading.Thread(target=self._read_ahead, args=(ready, stop), daemon=True)
        self._reader.start()
        while True:
            started_at = time.perf_counter()
            batch = ready.get()
            self.wait_s += time.perf_counter() - started_at
            if isinstance(batch, BaseException):
                raise batch
            yield batch

    def close(self) -> None:
        """End the reading thread; inside torch while Python shuts down it would abort the process."""
        self._stop.set()
        if self._reader is not None and self._reader is not threading.current_thread():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # it may be waiting for room
            self._reader.join()

    def _read_ahead(self, ready: queue.Queue[Tensor | BaseException], stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            try:
                batch: Tensor | BaseException = self.batch(number)
            except Exception as error:  # handed to the training thread, which raises it
                batch = error
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(batch, timeout=0.2)
                    break
            if isinstance(batch, BaseException):
                return
            number += 1


class HeldOutLoader:
    """The first held-out samples, in batches of (windows int64[rows, seq + 1], is_real bool[rows]).

    Every rank gets equally many full batches; rows that only fill the last ones are not real.
    """

    def __init__(
        self, tokens: TokenSplit, seq_len: int, most: int | None, rows: int, rank: int, world_size: int
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        available = num_windows(tokens.num_tokens, seq_len)
        self.num_samples = available if most is None else min(most, available)
        self.rows = rows
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.num_samples // (self.rows * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(self)):
            sample = (number * self.world_size + self.rank) * self.rows + np.arange(self.rows)
            starts = np.minimum(sample, self.num_samples - 1) * self.seq_len
            windows = self.tokens.read(starts, self.seq_len + 1)
            yield torch.from_numpy(windows), torch.from_numpy(sample < self.num_samples)
