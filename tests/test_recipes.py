"""What the shipped recipes and overlays say of themselves is what they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_fit import OVERLAYS, assert_same_state, measured, parsed  # noqa: F401

from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import PYTHIA, ModelConfig
from sinktrain.training.configs import find_config
from sinktrain.training.saving import CheckpointSettings
from sinktrain.training.throughput import PEAK_BF16_FLOPS, flops_per_token

BYTES_PER_PARAMETER = 12  # float32: the weight and AdamW's two moments
UNITS = {"GB": 1e9, "TB": 1e12}


def test_papers_run_is_pythias_with_a_quarter_of_its_batch(parsed: Callable[..., Any]) -> None:  # noqa: F811
    paper, pythia = parsed("paper-160m"), parsed("pythia-160m")
    assert (pythia.data.global_batch, paper.data.global_batch) == (1024, 256)
    paper.data.global_batch = pythia.data.global_batch
    for group in ("model", "data", "trainer", "checkpoint", "streaming", "seed_everything"):
        assert paper[group] == pythia[group], group


def test_cost_of_the_papers_run_is_the_formula_with_its_numbers(parsed: Callable[..., Any]) -> None:  # noqa: F811
    head = " ".join(line.removeprefix("# ") for line in find_config("paper-160m").read_text().splitlines())
    said = re.search(
        r"([\d,]+) tokens x ([\d.]+) GFLOP \(causal attention\) / \(([\d.]+) TFLOP/s x (\d+)% MFU\) "
        r"= (\d+) H100 hours, at ([\d,]+) tokens/s",
        head,
    )
    assert said
    tokens, gflops, tflops, mfu, hours, speed = (float(number.replace(",", "")) for number in said.groups())
    config = parsed("paper-160m")
    assert tokens == config.trainer.max_steps * config.data.global_batch * config.data.seq_len
    flops = flops_per_token(PYTHIA["pythia-160m"], 50304, config.data.seq_len, is_causal=True)
    assert gflops == pytest.approx(flops / 1e9, abs=5e-5)
    assert tflops * 1e12 == PEAK_BF16_FLOPS["H100"]
    assert speed == pytest.approx(tflops * 1e12 * mfu / 100 / flops, rel=1e-3)
    assert hours == pytest.approx(tokens / speed / 3600, abs=0.5)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_changes_a_recipe_and_leaves_its_network(
    overlay: str,
    parsed: Callable[..., Any],  # noqa: F811
) -> None:
    alone, together = parsed("pythia-160m"), parsed("pythia-160m", overlay)
    groups = ("model", "data", "trainer", "checkpoint")
    assert any(alone[group] != together[group] for group in groups)
    assert (alone.model.network, alone.data) == (together.model.network, together.data)


def disk_said(text: str) -> list[float]:
    return [float(size) * UNITS[unit] for size, unit in re.findall(r"([\d.]+) (GB|TB)", text)]


def test_pythias_checkpoints_take_the_disk_that_is_said() -> None:
    sizes = [sum(p.numel() for p in empty_model(ModelConfig(c)).parameters()) for c in PYTHIA.values()]
    expected = [154 * BYTES_PER_PARAMETER * size for size in sizes]
    assert disk_said(find_config("pythia-checkpoints").read_text()) == pytest.approx(expected, rel=0.03)
    for name, size in zip(PYTHIA, expected, strict=True):
        assert disk_said(find_config(name).read_text()) == [pytest.approx(size, rel=0.03)]


@cache
def due_and_for_good(settings: CheckpointSettings) -> tuple[int, int]:
    steps = range(143_001)
    return sum(map(settings.is_due, steps)), sum(map(settings.is_for_good, steps))


@pytest.mark.parametrize("name", [*PYTHIA, "paper-160m"])
def test_pythias_154_checkpoints_by_overlay_and_the_newest_without(
    name: str,
    parsed: Callable[..., Any],  # noqa: F811
) -> None:
    alone, with_overlay = (
        CheckpointSettings(**vars(config.checkpoint))
        for config in (parsed(name), parsed(name, "pythia-checkpoints"))
    )
    assert due_and_for_good(with_overlay) == (154, 154)
    assert alone.keep == CheckpointSettings().keep
    assert due_and_for_good(alone)[1] == 0


def test_one_trunk_of_wsd_serves_several_budgets(train: Callable[..., Path]) -> None:
    """From before the decay of a run of 12 steps, a run of 20 goes on as if planned from the start."""
    wsd = ["--config", "wsd", "--checkpoint.keep", "null"]
    whole = train("whole", *wsd, "--trainer.max_steps", "20")
    short = train("short", *wsd)
    trunk = short / "checkpoints" / "step-00000008.ckpt"
    longer = train("longer", *wsd, "--resume", str(trunk), "--trainer.max_steps", "20")
    assert_same_state(whole, longer)
    rates = measured(whole, "lr")
    assert rates[3] == rates[16] == rates[17] == 0.01
    assert rates[20] == pytest.approx(0.01 / 4)
    assert measured(short, "lr")[12] == pytest.approx(0.01 / 2)
