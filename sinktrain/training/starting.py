"""Where a run starts: found alike by every rank, and said in words."""

from __future__ import annotations

from pathlib import Path

from sinktrain.errors import ConfigError
from sinktrain.model.config import SinkConfig
from sinktrain.training.continuing import Continuation, newest_whole
from sinktrain.training.settings import TrainingCLI


def find_start(cli: TrainingCLI) -> Continuation:
    """What the run continues from.

    Raises:
        ConfigError: all of its checkpoints are damaged.
    """
    resume = cli.config.resume
    if resume == "none":
        return Continuation(None, {})
    if resume != "auto" and not cli.run.has_resumed(resume):
        return Continuation(Path(resume), {})
    found = newest_whole(cli.run.checkpoints)
    if resume != "auto" and not found.checkpoint and not found.passed_over:
        return Continuation(Path(resume), {})
    if found.passed_over and found.checkpoint is None:
        problems = "; ".join(found.passed_over.values())
        raise ConfigError(f"{problems}; pass --resume PATH, or choose another --run")
    return found


def is_finished(cli: TrainingCLI, checkpoint: Path | None, max_steps: int) -> bool:
    """Whether the run that would go on from this checkpoint has nothing left to do."""
    return checkpoint == cli.run.last and cli.run.is_finished(max_steps)


def start_text(cli: TrainingCLI, checkpoint: Path | None) -> str:
    """Such as ``from step-00004000.ckpt``, or ``from the weights of MODEL; sink row 265 is drawn anew``."""
    if checkpoint is not None:
        return f"from {checkpoint.resolve().name}"
    source = cli.model.source
    if source is None:
        return "from the start"
    sink = cli.model.model_config(cli.datamodule).sink
    return f"from the weights of {cli.model.init_from}{_sinks_text(sink, source.config.sink)}"


def _sinks_text(sink: SinkConfig, source: SinkConfig) -> str:
    """Which sinks the model to start from lends, and which it does not have."""
    if not sink.token_ids:
        return "" if sink.kind in ("none", source.kind) else f"; its {sink.kind} sink begins anew"
    drawn = [row for row in sink.token_ids if row not in source.token_ids]
    if not drawn:
        return ", sink included" if len(sink.token_ids) == 1 else ", sinks included"
    rows = ", ".join(map(str, drawn))
    return f"; sink row {rows} is drawn anew" if len(drawn) == 1 else f"; sink rows {rows} are drawn anew"
