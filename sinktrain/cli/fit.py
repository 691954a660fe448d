"""``sinktrain fit``: LightningCLI, with a help that fits on a page."""

from __future__ import annotations

import sys

FIT_HELP = """\
usage: sinktrain fit --config FILE_OR_NAME [--config OVERLAY …] [--run DIR] [options]

Train a model on prepared shards. Cut off, the same command continues where it was.

  --config NAME       quickstart, small, paper-160m, pythia-14m, -31m, -70m, -160m, -410m, -1b, -1.4b, or a
                      YAML file; then overlays: sink, wsd, pythia-checkpoints, ddp, fsdp, deepspeed-zero1,
                      -zero2, -zero3, wandb, tensorboard. Later ones win.
  --run DIR           run folder (default: runs/ and the names of the configs)
  --resume WHAT       auto (default), none, or a checkpoint's path
  --data.path SHARDS  made by sinktrain prepare
  --data.global_batch N, --data.micro_batch N      samples of a step, and computed at once
  --trainer.max_steps N, --trainer.devices N       as Lightning has them
  --model.sink.kind token, --model.init_from MODEL, --model.optimizer muon, --model.learning_rate X, …
  --checkpoint.every_n_steps N, --checkpoint.keep N        save so often, keep the newest (2) of them
  --seed_everything N
  --streaming.every_n_steps N                      streaming gaps and sinks as they emerge (0: not)
  --dry_run           check everything and print tokens, FLOPs, memory, disk and time; do nothing
  --trainer.fast_dev_run N                         a trial: N steps, a validation, a checkpoint, nothing kept
  --print_config      every setting, with its value, as YAML
  --help-all          every setting, with its meaning (takes some seconds)

example:
  sinktrain fit --config pythia-160m --config sink --config ddp --data.path shards
"""


def fit(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(FIT_HELP)
        return 0
    from sinktrain.experiments.emergence import streaming_gaps
    from sinktrain.training.fit import fit as train
    from sinktrain.training.stopping import Stopped

    try:
        train(_full_help(arguments), streaming_gaps)
    except Stopped as stopped:
        print(f"sinktrain fit: {stopped} and saved; the same command continues", file=sys.stderr)
        return 128 + stopped.signum
    return 0


def _full_help(arguments: list[str]) -> list[str]:
    return ["--help" if argument == "--help-all" else argument for argument in arguments]
