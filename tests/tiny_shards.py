"""Small real shards, and the command lines of runs on them that take a second."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from sinktrain.cli import main
from sinktrain.data.shards import Manifest, Shard, ShardWriter, SplitCounts, token_dtype
from sinktrain.data.tokenizer import train_tokenizer

SEQ_LEN = 32

TINY = """\
model:
  network: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}
  learning_rate: 0.01
  warmup_steps: 2
data:
  seq_len: 32
  global_batch: 8
  val_windows: 10
trainer:
  max_steps: 12
  accelerator: cpu
  val_check_interval: 5
  log_every_n_steps: 1
  enable_progress_bar: false
checkpoint:
  every_n_steps: 4
streaming:
  every_n_steps: 0
"""


def write_shards(folder: Path, train_tokens: int = 3000, val_tokens: int = 500, seed: int = 0) -> Manifest:
    """A text that a tiny model learns at once: each token is the one before it plus 1 to 3, modulo 50."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(iter(["a few words"]), vocab_size=300)
    tokenizer.save(folder / "tokenizer.json")
    draw = np.random.default_rng(seed)
    shards: list[Shard] = []
    splits = {}
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        writer = ShardWriter(folder, split, token_dtype(tokenizer.vocab_size), 0, [])
        writer.append(np.cumsum(draw.integers(1, 4, count)) % 50)
        writer.finish_shard()
        shards += writer.shards
        splits[split] = SplitCounts(count, 1, 1, count)
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.padded_vocab_size,
        sink_token_ids=tokenizer.sink_token_ids,
        eos_token_id=tokenizer.eos_token_id,
        dtype=token_dtype(tokenizer.vocab_size),
        shards=tuple(shards),
        splits=splits,
        source={"location": "generated"},
        val_fraction=0.1,
    )
    manifest.save(folder)
    return manifest


def tiny_run(shards: Path, run: Path, *more: str) -> list[str]:
    """Arguments of ``sinktrain fit`` for a run of 12 steps; later ones win."""
    config = run.parent / "tiny.yaml"
    if not config.exists():
        config.write_text(TINY)
    return ["--config", str(config), "--data.path", str(shards), "--run", str(run), *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """``sinktrain fit`` in a process of its own, as users start it."""
    command = [str(Path(sys.executable).with_name("sinktrain")), "fit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def start_quickly(arguments: list[str]) -> BaseProcess:
    """``sinktrain fit`` in a process of its own, forked from one that has imported what it needs and no more.

    Importing it once for all of them saves 5 to 10 seconds for each.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["sinktrain.training.fit", "sinktrain.experiments.emergence"])
    process = context.Process(target=_fit, args=(arguments,))
    process.start()
    return process


def _fit(arguments: list[str]) -> None:
    sys.exit(main(["fit", *arguments]))


def wait_for(step: int, run: Path, process: subprocess.Popen[str] | BaseProcess) -> None:
    """Return as soon as the run's table shows that step."""
    table, deadline = run / "metrics.csv", time.monotonic() + 120
    while not (
        table.exists() and any(line.startswith(f"{step},") for line in table.read_text().splitlines())
    ):
        if isinstance(process, subprocess.Popen):
            assert process.poll() is None, process.communicate()[1]
        else:
            assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
