"""What only a CUDA device can show: run with ``scripts/test -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import random_tokens, rotate_everything_stream, tiny_model
from tiny_shards import tiny_run, write_shards

from sinktrain.model.loss import token_losses
from sinktrain.streaming.blockwise import stream_logits
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.training.fit import fit
from sinktrain.training.metrics_table import MetricsTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_GPU = ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_streaming_on_cuda_equals_the_oracle(sinks: int) -> None:
    model = tiny_model()
    tokens = random_tokens(2, 60)
    expected = rotate_everything_stream(model, tokens, sinks, window=9)
    model.cuda()
    blocks = torch.cat(list(stream_logits(model, tokens, sinks, window=9)), dim=1).cpu()
    decoder = StreamingDecoder(model, sinks, window=9, batch_size=2)
    steps = torch.stack([decoder.step(tokens[:, i]) for i in range(60)], dim=1).cpu()
    torch.testing.assert_close(blocks, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(steps, expected, atol=1e-10, rtol=0)


def test_compiled_loss_and_gradients_equal_eager_ones() -> None:
    model, tokens = tiny_model().float().cuda().requires_grad_(True), random_tokens(2, 33).cuda()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        token_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    eager = gradients()
    model.compile(dynamic=False)
    torch.testing.assert_close(gradients(), eager, atol=1e-5, rtol=1e-4)


def test_a_compiled_bf16_run_learns_and_continues_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(tiny_run(tmp_path / "shards", whole, *ON_GPU, "--checkpoint.keep", "null"))
    middle = whole / "checkpoints" / "step-00000004.ckpt"
    fit(tiny_run(tmp_path / "shards", parts, *ON_GPU, "--resume", str(middle)))
    losses, continued = _losses(whole), _losses(parts)
    assert losses[12] < losses[1]
    assert sorted(continued) == list(range(5, 13))
    for step, loss in continued.items():  # a GPU does not always add in the same order
        assert loss == pytest.approx(losses[step], abs=2e-2)


def _losses(run: Path) -> dict[int, float]:
    rows = MetricsTable(run / "metrics.csv").rows()
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
