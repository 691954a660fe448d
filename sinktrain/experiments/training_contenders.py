"""What ``sinktrain bench train`` times against each other: ours under a Trainer and in a bare loop, peers.

A contender is on the device only while its round runs: Lightning takes a module away when ``fit`` ends,
and ``PeerTraining`` does so itself. What stays is compiled code.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

from sinktrain.data.datamodule import WindowData
from sinktrain.data.shards import Manifest, ShardWriter, SplitCounts, token_dtype
from sinktrain.data.tokenizer import RESERVED_SINKS, VOCAB_MULTIPLE
from sinktrain.evaluation.timing import held_bytes, peak_bytes, reset_peak
from sinktrain.experiments.time_by_part import time_by_part
from sinktrain.model.config import ModelConfig
from sinktrain.model.devices import dtype_name
from sinktrain.progress import progress_bar
from sinktrain.training.memory import STATE_BYTES
from sinktrain.training.metrics import Metrics, ProgressBar
from sinktrain.training.module import Pretraining
from sinktrain.training.saving import Checkpoints
from sinktrain.training.settings import TrainingCLI
from sinktrain.training.stopping import StopOnSignal

VOCAB_SIZE = 50_277
"""Ids of Pythia's tokenizer."""
NUM_BATCHES = 4
"""Global batches that those take in turn which have no loader."""
WARM_UP_STEPS = {"cpu": 2, "cuda": 5}
PROFILED_STEPS = {"cpu": 1, "cuda": 3}
COMPARED_LOSSES = 2
"""Of the first steps, which must be alike for all."""
PRECISION = {torch.bfloat16: "bf16-mixed", torch.float32: "32-true"}


@dataclass(frozen=True)
class Workload:
    """What every contender computes.

    Args:
        config: of ``sinktrain fit``, by name or path.
        strategy: an overlay's name; None trains on one device, a contender after the other.
        num_steps: timed in each round.
        folder: where the shards are; runs go there too.
    """

    config: str
    device: torch.device
    dtype: torch.dtype
    seq_len: int
    micro_batch: int
    global_batch: int
    num_devices: int
    strategy: str | None
    num_steps: int
    num_rounds: int
    folder: Path

    @property
    def preset(self) -> str:
        return Path(self.config).name.removesuffix(".yaml").removeprefix("pythia-")

    @property
    def warm_up(self) -> int:
        return WARM_UP_STEPS[self.device.type]

    @property
    def facts(self) -> dict[str, Any]:
        """What all rows of a workload share."""
        return {
            "preset": self.preset,
            "device": self.device.type,
            "dtype": dtype_name(self.dtype),
            "num_devices": self.num_devices,
            "strategy": self.strategy,
            "seq_len": self.seq_len,
            "micro_batch": self.micro_batch,
            "global_batch": self.global_batch,
        }

    def fit_arguments(self, name: str, options: Sequence[str], max_steps: int) -> list[str]:
        """The command line of ``sinktrain fit`` that this is; the learning rate stays where it begins."""
        configs = [self.config, *([self.strategy] if self.strategy else [])]
        index = self.device.index or 0
        settings = {
            "run": self.folder / name,
            "data.path": self.folder,
            "data.seq_len": self.seq_len,
            "data.micro_batch": self.micro_batch,
            "data.global_batch": self.global_batch,
            "model.schedule": "wsd",
            "model.warmup_steps": 0,
            "model.decay_steps": 0,
            "trainer.max_steps": max_steps,
            "trainer.precision": PRECISION[self.dtype],
            "trainer.accelerator": {"cuda": "gpu"}.get(self.device.type, "cpu"),
            "trainer.devices": self.num_devices if self.strategy or not index else f"[{index}]",
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "false",
            "checkpoint.every_n_steps": 10**9,
        }
        typed = [word for config in configs for word in ("--config", config)]
        typed += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return [*typed, *options]


@dataclass
class Record:
    """What the rounds of one way to train have shown.

    Attributes:
        step_s: seconds of a step, one value for each round.
        warm_up_s: of the first round's ``warm_up`` steps, compilation included.
        data_wait: share of each round that waited for batches; empty without a loader.
        first_losses: of the first two steps, in nats.
        peak_mem_bytes: allocated for it while it was timed; the whole process's on the CPU.
        checkpoint_s: seconds for which ``Checkpoints.begin`` stops training; the file is written behind it.
        parts: milliseconds of a step, from ``time_by_part``.
    """

    name: str
    note: str = ""
    step_s: list[float] = field(default_factory=list)
    warm_up_s: float | None = None
    data_wait: list[float] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)
    peak_mem_bytes: int | None = None
    skipped_steps: int | None = None
    checkpoint_s: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


class Contender(ABC):
    """A way, or several, to take the same steps."""

    records: list[Record]

    @abstractmethod
    def run(self, number: int) -> None:
        """The round of this number, from 0; under a strategy all of them at once."""

    @abstractmethod
    def release(self) -> None:
        """Let go of what it holds, because no more rounds of it will run."""


class Clock:
    """Seconds and peak memory of a stretch of steps; waits for the device where it begins and ends.

    Args:
        device: what others hold there already does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held = held_bytes(device) if device.type == "cuda" else 0
        self._started_at = 0.0

    def start(self) -> None:
        synchronize(self.device)
        reset_peak(self.device)
        self._started_at = time.perf_counter()

    def stop(self) -> float:
        synchronize(self.device)
        return time.perf_counter() - self._started_at

    def note_peak(self, record: Record, seen_bytes: float = 0) -> None:
        """Keep the most that was held since the start, or that someone saw who reset the device's count."""
        peak = max(peak_bytes(self.device), int(seen_bytes)) - self._held
        record.peak_mem_bytes = max(record.peak_mem_bytes or 0, peak)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- ours -----------------------------------------------------------------------------------------


class OurTraining(Contender):
    """A Pretraining module under a real Trainer, with the callbacks of ``sinktrain fit`` but its bar.

    After each round of the Trainer's the same step runs in a bare loop, on batches that are there already.

    Args:
        name: of its row and its run folder.
        options: of ``sinktrain fit`` besides the workload's.
        times_checkpoint: time one ``Checkpoints.begin`` at the end.
        is_profiled: take the time by part at the end.
    """

    def __init__(
        self,
        work: Workload,
        name: str,
        options: Sequence[str] = (),
        times_checkpoint: bool = False,
        is_profiled: bool = True,
    ) -> None:
        self.work = work
        self.times_checkpoint = times_checkpoint
        self.is_profiled = is_profiled
        self.rounds_at_once = work.num_rounds if work.strategy else 1
        max_steps = work.warm_up + self.rounds_at_once * work.num_steps
        self.cli = TrainingCLI(work.fit_arguments(name, options, max_steps))
        self.trained, self.bare = Record(name), Record(f"{name}, bare loop")
        self.records = [self.trained, self.bare]

    @property
    def config(self) -> ModelConfig:
        return self.cli.model.model_config(self.cli.datamodule)

    def run(self, number: int) -> None:
        is_last = number + self.rounds_at_once == self.work.num_rounds
        steps = self.work.warm_up + 2 * self.rounds_at_once * self.work.num_steps
        with round_bar(self.work, self.trained.name, number, steps) as bar:
            self.cli.run.checkpoints.mkdir(parents=True, exist_ok=True)
            trainer = self._trainer(is_last, bar)
            with _keyboard_interrupts():
                trainer.fit(self.cli.model, datamodule=self.cli.datamodule)

    def _trainer(self, is_last: bool, bar: tqdm[Any]) -> pl.Trainer:
        clock = Clock(self.work.device)
        trainer = self.cli.make_trainer(
            is_training=True, measures=lambda _, metrics: [Rounds(self, metrics, clock, is_last, bar)]
        )
        _leave_out(trainer, ProgressBar)
        if self.work.strategy is None:
            _leave_out(trainer, StopOnSignal)  # which saves first
        return trainer

    def release(self) -> None:
        """Lightning has let go of everything when ``fit`` ended."""


class Rounds(Callback):
    """Time the Trainer's steps, then as many in a bare loop, and so on."""

    def __init__(
        self, ours: OurTraining, metrics: Metrics, clock: Clock, is_last: bool, bar: tqdm[Any]
    ) -> None:
        self.ours = ours
        self.metrics = metrics
        self.clock = clock
        self.is_last = is_last
        self.bar = bar
        self._wait_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.bar.update()
        work, record, module = self.ours.work, self.ours.trained, cast(Pretraining, pl_module)
        if len(record.first_losses) < COMPARED_LOSSES:
            assert module.stepper.loss is not None
            record.first_losses.append(float(module.stepper.loss))
        timed = trainer.global_step - work.warm_up
        if timed == 0 and record.warm_up_s is None:
            record.warm_up_s = self.clock.stop()
        if timed > 0 and timed % work.num_steps == 0:
            self._end_round(trainer, module)
        if timed >= 0 and timed % work.num_steps == 0:
            self._wait_s = _loader_wait_s(trainer)
            self.clock.start()

    def _end_round(self, trainer: pl.Trainer, module: Pretraining) -> None:
        work, trained, bare = self.ours.work, self.ours.trained, self.ours.bare
        elapsed_s = self.clock.stop()
        self.clock.note_peak(trained, self.metrics.latest.get("memory_bytes", 0))
        trained.step_s.append(elapsed_s / work.num_steps)
        trained.data_wait.append((_loader_wait_s(trainer) - self._wait_s) / elapsed_s)
        trained.skipped_steps = module.stepper.guard.skipped
        take_steps = _bare_loop(trainer, self.bar.update)
        self.clock.start()
        take_steps(work.num_steps)
        bare.step_s.append(self.clock.stop() / work.num_steps)
        self.clock.note_peak(bare)
        if trainer.global_step == trainer.max_steps:
            self._end_run(trainer, take_steps)

    def _end_run(self, trainer: pl.Trainer, take_steps: Callable[[int], None]) -> None:
        ours, num_steps = self.ours, PROFILED_STEPS[self.ours.work.device.type]
        if self.is_last and ours.is_profiled:
            if trainer.is_global_zero:
                ours.bare.parts = time_by_part(take_steps, num_steps, ours.work.device)
            else:
                take_steps(num_steps)
        if self.is_last and ours.times_checkpoint and self._has_disk(trainer, ours.cli.model):
            [checkpoints] = [one for one in cast(Any, trainer).callbacks if isinstance(one, Checkpoints)]
            self.clock.start()
            checkpoints.begin(trainer)
            ours.trained.checkpoint_s = self.clock.stop()
        else:  # nothing is saved where it is not timed
            _leave_out(trainer, Checkpoints)

    def _has_disk(self, trainer: pl.Trainer, module: Pretraining) -> bool:
        """Whether a checkpoint surely fits beside the shards: rank 0's answer."""
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        free = shutil.disk_usage(self.ours.work.folder).free
        has_disk: bool = trainer.strategy.broadcast(free > STATE_BYTES * num_parameters)
        if not has_disk:
            self.ours.trained.note = "no checkpoint timed: too little disk for it"
        return has_disk


def _leave_out(trainer: pl.Trainer, kind: type[Callback]) -> None:
    callbacks = cast(Any, trainer).callbacks
    cast(Any, trainer).callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]


def _bare_loop(trainer: pl.Trainer, after_each: Callable[[], object]) -> Callable[[int], None]:
    """The training step under the strategy's precision, a number of times, without the Trainer's loop."""
    loader = _data(trainer).loader
    assert loader is not None
    batches = [loader.batch(number).to(trainer.strategy.root_device) for number in range(NUM_BATCHES)]

    def take_steps(num_steps: int) -> None:
        for number in range(num_steps):
            trainer.strategy.training_step(batches[number % NUM_BATCHES], number)
            after_each()

    return take_steps


def _loader_wait_s(trainer: pl.Trainer) -> float:
    loader = _data(trainer).loader
    return loader.wait_s if loader is not None else 0.0


def _data(trainer: pl.Trainer) -> WindowData:
    return cast(WindowData, cast(Any, trainer).datamodule)


@contextmanager
def _keyboard_interrupts() -> Iterator[None]:
    """Lightning makes exit code 1 of them."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


# -- what they share ------------------------------------------------------------------------------


def write_random_shards(folder: Path, num_tokens: int, held_out: int) -> None:
    """Shards of random tokens of Pythia's vocabulary: the same on every rank."""
    draw = np.random.default_rng(0)
    dtype = token_dtype(VOCAB_SIZE)
    writers = {split: ShardWriter(folder, split, dtype, 0, []) for split in ("train", "val")}
    counts = {"train": num_tokens, "val": held_out}
    for split, writer in writers.items():
        writer.append(draw.integers(0, VOCAB_SIZE, counts[split]))
        writer.finish_shard()
    Manifest(
        tokenizer_sha256="",
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=-(-(VOCAB_SIZE + RESERVED_SINKS) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        sink_token_ids=tuple(range(VOCAB_SIZE, VOCAB_SIZE + RESERVED_SINKS)),
        eos_token_id=0,
        dtype=dtype,
        shards=tuple(shard for writer in writers.values() for shard in writer.shards),
        splits={split: SplitCounts(count, 1, 1, count) for split, count in counts.items()},
        source={"location": "random tokens"},
        val_fraction=held_out / (num_tokens + held_out),
    ).save(folder)


def is_rank_zero() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def round_bar(work: Workload, name: str, number: int, num_steps: int) -> tqdm[Any]:
    told = f"{number + 1} of {work.num_rounds}" if work.strategy is None else f"1 to {work.num_rounds}"
    doing = f"{work.preset}: {name}, round {told}"
    return progress_bar(desc=doing, total=num_steps, unit="step", disable=not is_rank_zero())
