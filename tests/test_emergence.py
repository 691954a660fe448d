"""Streaming measured while a model trains: the right figures, and a training that does not notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from test_fit import assert_same_state, checkpoint, measured, rows
from tiny_models import random_tokens, tiny_model
from tiny_shards import SEQ_LEN, tiny_run

from sinktrain.cli import main
from sinktrain.data.datamodule import WindowData
from sinktrain.data.shards import TokenSplit
from sinktrain.evaluation.sink_metric import sink_metric
from sinktrain.experiments import emergence
from sinktrain.experiments.emergence import StreamingGaps, measure_emergence, streaming_gaps
from sinktrain.model.checkpoints import load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import Layout
from sinktrain.training.fit import fit
from sinktrain.training.fsdp import FSDP2Strategy
from sinktrain.training.metrics import Metrics
from sinktrain.training.metrics_table import COLUMNS, MetricsTable
from sinktrain.training.module import Pretraining
from sinktrain.training.settings import StreamingSettings

EVERY_4 = ["--streaming.every_n_steps", "4"]
NAMES = [
    *(f"stream/loss_{layout}" for layout in ("0+16", "1+15", "4+12")),
    *("stream/gap", "sink/metric", "sink/metric_first"),
]


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """``sinktrain fit`` with streaming measured as the command line has it, for 12 tiny steps."""

    def run(name: str = "run", *options: str) -> Path:
        fit(tiny_run(shards, tmp_path / name, *options), streaming_gaps)
        return tmp_path / name

    return run


SINK_EVERY_2 = ["--config", "sink", "--streaming.every_n_steps", "2"]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sink that is measured every 2 steps and never cut off."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(
        tiny_run(shards, run, *SINK_EVERY_2, "--config", "tensorboard", "--checkpoint.keep", "null"),
        streaming_gaps,
    )
    return run


def before_step(at_step: int, act: Callable[[Pretraining], None], patch: pytest.MonkeyPatch) -> None:
    real = Pretraining.training_step

    def training_step(module: Pretraining, windows: torch.Tensor, batch_idx: int) -> None:
        if module.trainer.global_step == at_step:
            act(module)
        real(module, windows, batch_idx)

    patch.setattr(Pretraining, "training_step", training_step)


def held_out(shards: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    split = TokenSplit.open(shards, "val")
    return split.read(np.zeros(1, np.int64), split.num_tokens)[0]


# -- the figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_losses_and_gap_equal_those_streamed_one_by_one(num_sinks: int) -> None:
    """Of every token from N on, in streams of four windows; the gap is against the model's own sinks."""
    model = tiny_model(sink=SinkConfig("token", num_sinks, (90, 91)[:num_sinks]) if num_sinks else None)
    tokens = random_tokens(80, 1, 100)[0]
    layouts = [Layout(0, 12), Layout(1, 11), Layout(2, 10)]
    found = measure_emergence(model, tokens.numpy(), layouts)
    losses = {}
    for layout in layouts:
        scored = []
        for stream in tokens.view(2, 50):
            whole = torch.cat((torch.tensor(model.sink_ids, dtype=torch.int64), stream))
            of_stream = stream_loss(model, whole[None], layout.sinks, layout.window)[0]
            scored += [float(of_stream[num_sinks + index - 1]) for index in range(12, 50)]
        losses[layout] = sum(scored) / len(scored)
        assert found[f"stream/loss_{layout}"] == pytest.approx(losses[layout], rel=1e-5)
    gap = losses[layouts[0]] - losses[layouts[max(1, num_sinks)]]
    assert found["stream/gap"] == pytest.approx(gap, abs=1e-5)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sink_metrics_are_those_of_the_own_sink_and_of_the_first_token_of_the_text(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lower bar than 0.3, which no head of random weights reaches."""
    monkeypatch.setattr(emergence, "METRIC_EPS", 0.02)
    model = tiny_model(sink=SinkConfig(kind, 1, (90,) if kind == "token" else ()), seed=3)
    tokens = random_tokens(80, 1, 64 * 5 + 9)[0].numpy()
    found = measure_emergence(model, tokens, [Layout(0, 12)])
    expected = sink_metric(model, tokens[: 64 * 5].reshape(5, 64), seq_len=64, eps=0.02)
    assert found["sink/metric"] == expected.by_position[0] > 0
    assert found["sink/metric_first"] == expected.by_position[len(model.sink_ids)]
    assert found.get("sink/metric_null") == expected.null
    assert (expected.null is not None) == (model.gpt_neox.layers[0].attention.sink.null_slot() is not None)


def test_gap_is_of_the_largest_layouts_that_have_both_and_absent_without() -> None:
    model, tokens = tiny_model(), random_tokens(97, 1, 80)[0].numpy()

    def gap(*layouts: str) -> float | None:
        return measure_emergence(model, tokens, [Layout.parse(layout) for layout in layouts]).get(
            "stream/gap"
        )

    both = measure_emergence(model, tokens, [Layout(0, 16), Layout(1, 15)])
    of_16 = both["stream/loss_0+16"] - both["stream/loss_1+15"]
    assert gap("0+16", "1+15", "0+8", "1+7") == pytest.approx(of_16, abs=1e-6)
    assert gap("0+16", "1+7", "4+12") is None


def test_first_token_after_eight_sinks_is_beyond_the_metric() -> None:
    model = tiny_model(sink=SinkConfig("token", 8, tuple(range(89, 97))), max_position_embeddings=16)
    found = measure_emergence(model, random_tokens(80, 1, 60)[0].numpy(), [Layout(0, 12)])
    assert "sink/metric" in found
    assert "sink/metric_first" not in found


def test_default_layouts_keep_none_one_four_and_the_own_sinks(shards: Path, tmp_path: Path) -> None:
    data, metrics = WindowData(str(shards), SEQ_LEN), Metrics(MetricsTable(tmp_path / "metrics.csv"))
    of = {
        num_sinks: list(map(str, StreamingGaps(StreamingSettings(), data, num_sinks, metrics).layouts))
        for num_sinks in (0, 1, 2)
    }
    assert of == {
        0: ["0+16", "1+15", "4+12"],
        1: ["0+16", "1+15", "4+12"],
        2: ["0+16", "1+15", "2+14", "4+12"],
    }


# -- in a run -------------------------------------------------------------------------------------


def test_training_is_bit_for_bit_the_same_without(whole: Path, train: Callable[..., Path]) -> None:
    """Weights, optimizer, place in the data, random states and every loss."""
    without = train("without", "--config", "sink", "--streaming.every_n_steps", "0")
    assert_same_state(without, whole)
    for name in ("train/loss", "val/loss", "grad_norm", "lr", "tokens_seen"):
        assert measured(without, name) == measured(whole, name)
    assert set(rows(without)[0]) == set(COLUMNS)


def test_measuring_leaves_modes_gradients_and_random_states_alone(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looked = StreamingGaps._measure, []

    def _measure(self: StreamingGaps, trainer: Any, module: Pretraining) -> None:
        def state() -> list[Any]:
            return [
                [(part.training, len(part._forward_pre_hooks)) for part in module.modules()],
                [(weight.requires_grad, weight.grad, weight._version) for weight in module.parameters()],
                [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()],
                [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()],
            ]

        before = state()
        real(self, trainer, module)
        assert state() == before
        looked.append(trainer.global_step)

    monkeypatch.setattr(StreamingGaps, "_measure", _measure)
    train("run", *EVERY_4)
    assert looked == [0, 4, 8, 12, 12]


def test_each_row_is_what_the_checkpoint_of_its_step_gives(whole: Path, shards: Path) -> None:
    """Nothing of earlier weights is remembered while they change in place."""
    for step in (4, 8, 12):
        model = load_model(whole / "checkpoints" / f"step-{step:08}.ckpt")
        expected = measure_emergence(model, held_out(shards), [Layout(0, 16), Layout(1, 15), Layout(4, 12)])
        assert {name: measured(whole, name)[step] for name in NAMES} == expected
    assert measured(whole, "stream/loss_0+16")[0] > 5.5 > measured(whole, "stream/loss_0+16")[12]


@pytest.mark.parametrize(
    "when",
    [pytest.param("in the step after 7", marks=pytest.mark.slow), "in the measurement at 4"],
)
def test_a_run_cut_off_measures_the_same_bit_for_bit(
    when: str, whole: Path, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is measured before its checkpoint is written, so that none goes without: cut off there, at the
    first one, the run starts again, and step 0 still stands there once."""

    def cut_off(*_: Any) -> None:
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        if when == "in the step after 7":
            before_step(7, cut_off, patch)
        else:
            before_step(3, lambda module: patch.setattr(emergence, "measure_emergence", cut_off), patch)
        with pytest.raises(RuntimeError, match="cut off"):
            train("parts", *SINK_EVERY_2)
    parts = train("parts", *SINK_EVERY_2)
    for name in NAMES:
        assert measured(whole, name) == measured(parts, name)
        assert list(measured(whole, name)) == [0, 2, 4, 6, 8, 10, 12]


def test_a_run_that_ends_early_is_measured_at_its_end(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(module: Pretraining) -> None:
        module.trainer.should_stop = True

    before_step(6, end, monkeypatch)
    run = train("run", *EVERY_4)
    assert checkpoint(run)["global_step"] == 7
    assert list(measured(run, "stream/gap")) == [0, 4, 7]


def test_streaming_may_be_switched_on_and_change_its_layouts_when_a_run_goes_on(
    train: Callable[..., Path],
) -> None:
    """The table grows columns, and rows before keep theirs: also that of the end of a shorter run."""
    steps = ["--model.warmup_steps", "1", "--trainer.max_steps"]
    train("run", "--streaming.every_n_steps", "null", *steps, "3")
    train("run", *EVERY_4, *steps, "6")
    run = train("run", *EVERY_4, "--streaming.layouts", "0+8,1+7", *steps, "9")
    assert list(measured(run, "train/loss")) == list(range(1, 10))
    assert list(measured(run, "stream/gap")) == [4, 6, 8, 9]
    assert list(measured(run, "stream/loss_0+16")) == [4, 6]
    assert list(measured(run, "stream/loss_0+8")) == [8, 9]


def test_its_time_is_logged_told_once_if_too_much_and_not_counted_in_the_speed(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock that only the measurement moves forward by much: an hour each."""
    real, now = emergence.measure_emergence, [0.0]

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    def measure_slowly(*arguments: Any) -> dict[str, float]:
        now[0] += 3600
        return real(*arguments)

    monkeypatch.setattr(emergence, "measure_emergence", measure_slowly)
    for module in ("sinktrain.training.metrics", "sinktrain.experiments.emergence"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=clock))
    run = train("run", "--streaming.every_n_steps", "3", "--trainer.log_every_n_steps", "2")
    shares = measured(run, "stream/time_share")
    assert list(shares) == [3, 6, 9, 12]  # at step 0 nothing has been trained
    assert all(0.999 < share < 1 for share in shares.values())
    assert min(measured(run, "tokens_per_s").values()) > 1000
    assert capsys.readouterr().err.count("measuring the streaming takes") == 1


def test_a_rhythm_that_costs_more_than_a_hundredth_is_told_with_what_to_type(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = a_callback(shards, tmp_path)
    callback._warn_if_slow(0.01)
    assert capsys.readouterr().err == ""
    callback._warn_if_slow(0.0301)
    assert capsys.readouterr().err == (
        "measuring the streaming takes 3.0% of the time; for 1%, --streaming.every_n_steps 3010 "
        "(0 measures nothing) or a smaller --streaming.max_tokens\n"
    )


def test_loggers_get_the_same_figures(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    for name in NAMES:
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx(measured(whole, name), rel=1e-6, abs=1e-7)


def test_the_command_line_measures_and_config_yaml_keeps_how(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["fit", *tiny_run(shards, run, *EVERY_4, "--streaming.max_tokens", "99")]) == 0
    assert list(measured(run, "sink/metric")) == [0, 4, 8, 12]
    settings = yaml.safe_load((run / "config.yaml").read_text())["streaming"]
    assert settings == {"every_n_steps": 4, "max_tokens": 99, "layouts": None}


# -- devices --------------------------------------------------------------------------------------


def a_callback(shards: Path, tmp_path: Path) -> StreamingGaps:
    metrics = Metrics(MetricsTable(tmp_path / "metrics.csv"))
    return StreamingGaps(StreamingSettings(), WindowData(str(shards), SEQ_LEN), 0, metrics)


def a_trainer(strategy: Any, rank: int = 0) -> Any:
    return SimpleNamespace(strategy=strategy, is_global_zero=rank == 0, global_step=0, max_steps=10)


def test_sharded_strategy_is_told_and_not_measured(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        a_callback(shards, tmp_path).on_train_start(
            a_trainer(FSDP2Strategy(), rank), Pretraining.__new__(Pretraining)
        )
    told = capsys.readouterr().err
    assert told == "streaming is not measured under FSDP2Strategy, which leaves no device a whole network\n"
    assert not (tmp_path / "metrics.csv").exists()


def test_ranks_but_the_first_measure_nothing(shards: Path, tmp_path: Path) -> None:
    a_callback(shards, tmp_path).on_train_start(
        a_trainer(DDPStrategy(), rank=1), Pretraining.__new__(Pretraining)
    )
    assert not (tmp_path / "metrics.csv").exists()


def test_bfloat16_copy_is_measured_only_on_cuda_under_bf16_mixed() -> None:
    network = tiny_model()
    assert emergence._measurable(network, SimpleNamespace(precision="bf16-mixed")) is network
    assert emergence._measurable(network, SimpleNamespace(precision="32-true")) is network
    twin = emergence._bfloat16_copy(network)
    assert twin.dtype == torch.bfloat16
    assert network.dtype == torch.float32
    assert torch.equal(twin.rotary_steps, network.rotary_steps)
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, network.state_dict()[name].bfloat16())
    tokens = random_tokens(97, 1, 60)[0].numpy()
    losses = [
        measure_emergence(model, tokens, [Layout(1, 11)])["stream/loss_1+11"] for model in (twin, network)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_bf16_training_measures_its_bfloat16_weights(
    train: Callable[..., Path], shards: Path
) -> None:
    on_gpu = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    run = train("run", *EVERY_4, *on_gpu, "--checkpoint.keep", "null")
    for step in (4, 8, 12):
        path = run / "checkpoints" / f"step-{step:08}.ckpt"
        model = load_model(path, device="cuda", dtype=torch.bfloat16)
        expected = measure_emergence(model, held_out(shards), [Layout(0, 16), Layout(1, 15), Layout(4, 12)])
        assert {name: measured(run, name)[step] for name in NAMES} == pytest.approx(expected, abs=1e-3)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--streaming.every_n_steps -1",
            "streaming.every_n_steps -1 must be 0 (never) or more, and streaming.max_tokens None 1 or more",
        ),
        ("--streaming.max_tokens 0", "and streaming.max_tokens 0 1 or more"),
        ("--streaming.layouts 1-15", 'layout "1-15" is not sinks+window'),
        ("--streaming.layouts 1+32", "layout 1+32 needs 33 positions but the model was trained on 32"),
        (
            "--streaming.max_tokens 17",
            "measuring the streaming needs 18 held-out tokens or more, and there are 17; use a larger "
            "--streaming.max_tokens, smaller --streaming.layouts, or --streaming.every_n_steps 0",
        ),
        ("--streaming.every 5", 'unknown setting "streaming.every"; did you mean "streaming.every_n_steps"?'),
    ],
)
def test_mistake_is_one_line_before_anything_is_written(
    options: str, line: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *tiny_run(shards, tmp_path / "run", *EVERY_4, *options.split())]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
