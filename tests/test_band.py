"""The Triton kernels of exact evaluation against the plain band: by Triton's interpreter without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grids import thinned
from oracles import model_with_every_part, random_tokens, tiny_model

from sinktrain.model.loss import token_losses
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming.band import PlainBand
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import Layout

pytest.importorskip("triton")
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fed(band: Any, model: GPTNeoX, tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    hidden = []
    for block in torch.split(tokens, block_size, dim=1):
        band.begin(block.shape[1])
        hidden.append(model.hidden(block, band))
    return torch.cat(hidden, dim=1)


@pytest.mark.parametrize(
    ("layout", "block_size"), thinned(["0+20", "1+19", "4+33", "2+1", "20+10", "0+200"], [21, 100])
)
def test_banded_kernels_equal_the_plain_band_through_wraps(layout: str, block_size: int) -> None:
    from sinktrain.streaming.band_fused import FusedBand

    model = tiny_model(dtype=torch.float32, **SMALL).to(DEVICE)
    tokens = random_tokens(2, 100).to(DEVICE)
    parsed = Layout.parse(layout)
    fused = FusedBand(model, parsed, 2, 100, block_size)
    fused_hidden = fed(fused, model, tokens, block_size)
    plain_hidden = fed(PlainBand(model, parsed, 2), model, tokens, 100)
    torch.testing.assert_close(fused_hidden, plain_hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "sizes", [{"rotary_pct": 0.0}, {"rotary_pct": 1.0}, {"hidden_size": 40, "rotary_pct": 0.5}], ids=str
)
def test_banded_kernels_take_any_head_and_rotation(sizes: dict[str, Any]) -> None:
    from sinktrain.streaming.band_fused import FusedBand

    model = tiny_model(dtype=torch.float32, num_hidden_layers=1, **sizes).to(DEVICE)
    tokens, layout = random_tokens(1, 100).to(DEVICE), Layout(1, 30)
    fused = fed(FusedBand(model, layout, 1, 100), model, tokens, 64)
    torch.testing.assert_close(fused, fed(PlainBand(model, layout, 1), model, tokens, 100), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "layout"), thinned(sorted(KINDS), ["0+20", "1+9", "4+13"]))
def test_banded_kernels_equal_the_plain_band_for_every_sink_kind(kind: str, layout: str) -> None:
    from sinktrain.streaming.band_fused import FusedBand

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "rotary_pct": 0.5}
    model = tiny_model(dtype=torch.float32, kind=kind, **sizes).to(DEVICE)
    tokens, parsed = random_tokens(1, 50).to(DEVICE), Layout.parse(layout)
    fused = fed(FusedBand(model, parsed, 1, 50, 30), model, tokens, 30)
    plain = fed(PlainBand(model, parsed, 1), model, tokens, 50)
    torch.testing.assert_close(fused, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("0+9", {"rotary_pct": 0.0}),
        ("2+7", {"hidden_size": 120, "num_attention_heads": 3}),
        ("0+9", {"num_hidden_layers": 2}),
    ],
    ids=str,
)
def test_banded_kernels_take_a_null_slot_of_every_part(layout: str, sizes: dict[str, Any]) -> None:
    from sinktrain.streaming.band_fused import FusedBand

    model = model_with_every_part(dtype=torch.float32, **{"num_hidden_layers": 1, **sizes}).to(DEVICE)
    tokens, parsed = random_tokens(1, 40).to(DEVICE), Layout.parse(layout)
    fused = fed(FusedBand(model, parsed, 1, 40, 25), model, tokens, 25)
    plain = fed(PlainBand(model, parsed, 1), model, tokens, 40)
    torch.testing.assert_close(fused, plain, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_compiled_bands_equal_the_plain_one_in_float32_and_lose_little_in_bfloat16(
    kind: str, sinks: int
) -> None:
    model, tokens = tiny_model(kind=kind), random_tokens(3, 300)
    tokens[:, : len(model.sink_ids)] = torch.tensor(model.sink_ids)
    expected = stream_loss(model, tokens, sinks, 40)
    single = stream_loss(model.float().cuda(), tokens, sinks, 40).cpu().double()
    torch.testing.assert_close(single, expected, atol=5e-5, rtol=0)
    half = stream_loss(model.bfloat16(), tokens, sinks, 40).cpu().double()
    assert 0 < (half - expected).abs().mean() < 0.2
    assert (half - expected).mean().abs() < 0.02


@pytest.mark.parametrize("num_rows", [1, 130])
def test_the_loss_without_logits_equals_the_cross_entropy_of_the_logits(num_rows: int) -> None:
    from sinktrain.streaming.band_fused import fused_losses

    model = tiny_model(dtype=torch.float32).to(DEVICE)
    hidden = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = random_tokens(1, num_rows)[0].to(DEVICE)
    expected = token_losses(model.logits(hidden)[None], targets[None])[0]
    torch.testing.assert_close(fused_losses(model, hidden, targets), expected, rtol=0, atol=2e-5)
