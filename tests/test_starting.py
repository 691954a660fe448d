"""The first line of a run says where it starts: the start, a checkpoint, or another model's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_model, write_run
from tiny_shards import SEQ_LEN, tiny_run

from sinktrain.cli import main
from sinktrain.model.config import SinkConfig

ROWS, SINK = 384, 265  # of the tiny shards: rows of a model's vocabulary, the first id kept for sinks


def model(folder: Path, sink: SinkConfig) -> Path:
    return write_run(tiny_model(sink=sink, vocab_size=ROWS, max_position_embeddings=SEQ_LEN), folder)


@pytest.mark.parametrize(
    ("own", "options", "sinks"),
    [
        (SinkConfig(), "", ""),
        (SinkConfig(), "--config sink", "; sink row 265 is drawn anew"),
        (SinkConfig(), "--config sink --model.sink.count 2", "; sink rows 265, 266 are drawn anew"),
        (SinkConfig("token", 1, (SINK,)), "", ""),
        (SinkConfig("token", 1, (SINK,)), "--config sink", ", sink included"),
        (
            SinkConfig("token", 1, (SINK,)),
            "--config sink --model.sink.count 2",
            "; sink row 266 is drawn anew",
        ),
        (SinkConfig("token", 2, (SINK, 266)), "--config sink --model.sink.count 2", ", sinks included"),
        (SinkConfig(), "--model.sink.kind logit", "; its logit sink begins anew"),
    ],
)
def test_a_plan_says_whose_weights_it_starts_from_and_which_sinks_are_new(
    own: SinkConfig,
    options: str,
    sinks: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = model(tmp_path / "old", own)
    arguments = [*options.split(), "--model.init_from", str(source), "--dry_run"]
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *arguments)]) == 0
    start = capsys.readouterr().out.splitlines()[1].split(maxsplit=1)[1]
    assert start == f"from the weights of {source}{sinks}"


def test_a_run_says_so_when_it_begins_and_names_its_checkpoint_when_it_goes_on(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It once said only ``from the start``, as runs of Pythia's own initialisation do."""
    source = model(tmp_path / "old", SinkConfig())
    options = ["--config", "sink", "--model.init_from", str(source)]
    train("run", *options)
    begun = capsys.readouterr().err.splitlines()[0]
    assert begun.endswith(f"m parameters, from the weights of {source}; sink row 265 is drawn anew")
    train("run", *options, "--trainer.max_steps", "14")
    assert capsys.readouterr().err.splitlines()[0].endswith("m parameters, from step-00000012.ckpt")
