"""``model.init_from``: an existing GPT-NeoX goes on, as it is or with a sink that it never had."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fit import checkpoint, measured
from tiny_models import tiny_model, write_run
from tiny_shards import SEQ_LEN, tiny_run
from torch.nn import functional as F

from sinktrain.cli import main
from sinktrain.data.datamodule import WindowData
from sinktrain.model.checkpoints import load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.init import continue_from
from sinktrain.model.neox import GPTNeoX
from sinktrain.publishing.export import export
from sinktrain.training import module as training_module

ROWS, SINK, NEXT_SINK = 384, 265, 266  # of the tiny shards: rows of a model's vocabulary, ids kept for sinks
FROM_START = ["--checkpoint.log_spaced", "true", "--trainer.max_steps", "5"]


@pytest.fixture
def retrofit(train: Callable[..., Path]) -> Callable[..., Path]:
    """A short run from a model, with a checkpoint from before its first step."""

    def run(source: Path, *options: str) -> Path:
        return train("retrofit", "--model.init_from", str(source), *FROM_START, *options)

    return run


def at_start(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run / "checkpoints" / "step-00000000.ckpt").state_dict())


def rows_that_differ(run: Path, source: GPTNeoX) -> list[int]:
    """Rows of the embedding; everything else must be the same."""
    weights = at_start(run)
    for name, weight in source.state_dict().items():
        if name != "gpt_neox.embed_in.weight":
            assert torch.equal(weights[name], weight), name
    differs = (weights["gpt_neox.embed_in.weight"] != source.gpt_neox.embed_in.weight).any(dim=1)
    return [int(row) for row in differs.nonzero()]


def old_model(folder: Path, **changes: Any) -> Path:
    """A vanilla run whose unused rows have decayed, as Pythia's have."""
    model = tiny_model(**{"vocab_size": ROWS, "max_position_embeddings": SEQ_LEN} | changes)
    model.gpt_neox.embed_in.weight[SINK:] = 0.0
    return write_run(model, folder)


def test_a_new_sink_gets_a_fresh_row_and_all_else_stays(
    retrofit: Callable[..., Path], tmp_path: Path
) -> None:
    source = old_model(tmp_path / "old", hidden_size=128, num_attention_heads=4)
    run = retrofit(source, "--config", "sink", "--model.sink.count", "2")
    assert rows_that_differ(run, load_model(source)) == [SINK, NEXT_SINK]
    fresh = at_start(run)["gpt_neox.embed_in.weight"][[SINK, NEXT_SINK]]
    assert float(fresh.std()) == pytest.approx(math.sqrt(2 / (5 * 128)), rel=0.15)
    assert not torch.equal(fresh[0], fresh[1])
    trained = load_model(run)
    assert trained.sink_ids == [SINK, NEXT_SINK]
    assert not torch.equal(trained.gpt_neox.embed_in.weight[SINK], fresh[0]), "its sink was not trained"


def test_fresh_rows_come_from_the_seed() -> None:
    source, drawn = tiny_model(), []
    for seed in (7, 7, 8):
        model = tiny_model(sink=SinkConfig("token", 1, (96,)))
        continue_from(model, source, seed)
        drawn.append(model.gpt_neox.embed_in.weight[96])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_vanilla_run_starts_with_the_weights_and_the_loss_of_the_model(
    retrofit: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    source = old_model(tmp_path / "old")
    run, model = retrofit(source), load_model(source)
    assert rows_that_differ(run, model) == []
    windows = WindowData(str(shards), SEQ_LEN, global_batch=8).train_dataloader().batch(0)
    logits = model(windows[:, :-1]).flatten(0, 1)
    expected = float(F.cross_entropy(logits, windows[:, 1:].flatten()))
    losses = measured(run, "train/loss")
    assert losses[1] == pytest.approx(expected, rel=1e-6)
    assert losses[5] < losses[1]


def test_a_sink_that_the_model_has_is_left_alone_and_only_a_further_one_is_new(
    retrofit: Callable[..., Path], tmp_path: Path
) -> None:
    """Its own sink, wherever it is, comes before those of the shards."""
    sizes = {"vocab_size": ROWS, "max_position_embeddings": SEQ_LEN}
    source = write_run(tiny_model(sink=SinkConfig("token", 1, (300,)), **sizes), tmp_path / "old")
    run = retrofit(source, "--config", "sink", "--model.sink.count", "2")
    assert load_model(run).sink_ids == [300, SINK]
    assert rows_that_differ(run, load_model(source)) == [SINK]


def test_a_hub_folder_of_another_length_and_half_precision_goes_on(
    retrofit: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    export(str(old_model(tmp_path / "old", max_position_embeddings=64)), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("sink")["kind"] == "none"
    assert config["max_position_embeddings"] == 64
    (folder / "config.json").write_text(json.dumps(config))
    run = retrofit(folder, "--config", "sink")
    assert rows_that_differ(run, load_model(folder)) == [SINK]
    assert load_model(run).config.network.max_position_embeddings == SEQ_LEN
    saved = checkpoint(run)["state_dict"].values()
    assert {w.dtype for w in saved} == {torch.float32}


def test_rows_that_padding_lacks_are_not_needed_by_a_vanilla_run(
    retrofit: Callable[..., Path], tmp_path: Path
) -> None:
    """The 265 ids of the text suffice; that the shards' own models would have 384 rows does not matter."""
    run = retrofit(old_model(tmp_path / "old", vocab_size=265))
    assert load_model(run).config.vocab_size == 265


def test_the_model_is_read_once(
    retrofit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    def counted(source: Any) -> GPTNeoX:
        read.append(source)
        return load_model(source)

    monkeypatch.setattr(training_module, "load_model", counted)
    retrofit(old_model(tmp_path / "old"), "--config", "sink")
    assert len(read) == 1


REFUSALS = {
    (
        100,
        "",
    ): "--model.init_from {m} has 100 vocabulary rows and the shards have 265 token ids; prepare the text "
    "with the model's own tokenizer (sinktrain prepare TEXT --tokenizer …)",
    (
        265,
        "--config sink",
    ): "--model.init_from {m} has 265 vocabulary rows and none for sink token 265; name rows "
    "that the text never uses with --model.sink.token_ids",
}


@pytest.mark.parametrize(("rows", "options"), REFUSALS)
def test_a_vocabulary_that_is_too_small_is_refused_with_the_remedy(
    rows: int, options: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_run(tiny_model(vocab_size=rows), tmp_path / "old")
    arguments = tiny_run(shards, tmp_path / "new", "--model.init_from", str(model), *options.split())
    assert main(["fit", *arguments]) == 2
    told = capsys.readouterr().err
    assert REFUSALS[rows, options].format(m=model) in told
    assert told.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_remedy_for_a_missing_sink_row_works(retrofit: Callable[..., Path], tmp_path: Path) -> None:
    source = old_model(tmp_path / "old", vocab_size=265)
    run = retrofit(source, "--config", "sink", "--model.sink.token_ids", "[200]")
    assert load_model(run).sink_ids == [200]
    assert rows_that_differ(run, load_model(source)) == [200]
