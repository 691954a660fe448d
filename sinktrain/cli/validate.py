"""``sinktrain validate``: the held-out loss of a run's checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

from sinktrain.cli.printing import print_json
from sinktrain.errors import ConfigError, did_you_mean

HELP = """\
usage: sinktrain validate RUN [options]
       sinktrain validate --config FILE --ckpt_path PATH [options]

Held-out loss of a checkpoint, in nats, on the targets that all arms share. Nothing is written.

  RUN                 a run folder (its config.yaml, its newest whole checkpoint), or one of its checkpoints
  --config FILE       what the checkpoint was made with: the config.yaml of its run; then overlays
  --ckpt_path PATH    a checkpoint of sinktrain fit
  --data.path SHARDS  where the shards are, if they are not where the run found them
  --trainer.accelerator cpu, --data.micro_batch N, …      any option of sinktrain fit
  --json              print the result as JSON

example:
  sinktrain validate runs/quickstart/sink
  sinktrain validate runs/sink/checkpoints/step-00001000.ckpt --data.path shards --trainer.accelerator cpu
  sinktrain validate --config runs/sink/config.yaml --ckpt_path runs/sink/checkpoints/last.ckpt
"""


def validate(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    settings = _settings([argument for argument in arguments if argument != "--json"])
    from lightning_utilities.core.rank_zero import rank_zero_only

    from sinktrain.training.fit import validate as held_out_loss

    result = held_out_loss(settings)
    if getattr(rank_zero_only, "rank", 0):
        return 0  # rank 0 speaks for all
    if "--json" in arguments:
        print_json(result)
    else:
        print(f"held-out loss {result['val/loss']:.4f} nats")
    return 0


def _settings(arguments: list[str]) -> list[str]:
    """What was typed, with a config and a checkpoint in place of the run folder that may stand first.

    Raises:
        ConfigError: there is neither a config nor a run.
    """
    if not arguments:
        raise ConfigError("say what to score: sinktrain validate RUN, or --config FILE --ckpt_path PATH")
    first, *options = arguments
    if not first.startswith("-"):
        run, checkpoint = _run_and_checkpoint(first)
        return ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint), *options]
    checkpoint_typed = _value("--ckpt_path", arguments)
    if checkpoint_typed and Path(checkpoint_typed).is_dir():
        raise ConfigError(
            f"--ckpt_path {checkpoint_typed} is a folder; name a checkpoint, or if that is a run folder type "
            f"sinktrain validate {checkpoint_typed}"
        )
    if _value("--config", arguments) is None and _value("-c", arguments) is None:
        raise ConfigError(
            "--config is missing; pass the config.yaml of the run, or instead of both options type "
            f"sinktrain validate {checkpoint_typed or 'RUN'}"
        )
    return arguments


def _value(option: str, arguments: list[str]) -> str | None:
    """What was typed last for an option, as ``OPTION VALUE`` or ``OPTION=VALUE``."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option:
            found = following
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def _run_and_checkpoint(typed: str) -> tuple[Path, Path]:
    """The run folder, and the checkpoint of it that was named or is its newest whole one.

    Raises:
        ConfigError: there is no run here, or no whole checkpoint in it.
    """
    from sinktrain.training.continuing import newest_whole

    place = Path(typed).expanduser()
    if not place.exists():
        siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
        raise ConfigError(f"{typed}: no such run folder or checkpoint{did_you_mean(place.name, siblings)}")
    if place.is_file() and place.suffix != ".ckpt":
        raise ConfigError(f"{typed} is neither a run folder nor a .ckpt; see sinktrain validate --help")
    run = place.parent.parent if place.is_file() else place
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{typed} is of no run: there is no {run / 'config.yaml'}; "
            "type sinktrain validate --config FILE --ckpt_path PATH"
        )
    if place.is_file():
        return run, place
    found = newest_whole(run / "checkpoints")
    if found.checkpoint is None:
        problem = "; ".join(found.passed_over.values()) or f"{run}/checkpoints holds none"
        raise ConfigError(f"{typed} has no whole checkpoint: {problem}")
    for problem in found.passed_over.values():
        print(f"{problem}; scoring {found.checkpoint.name}, the one before", file=sys.stderr)
    return run, found.checkpoint
