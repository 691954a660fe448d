"""Quantisation: rounding against plain loops, models against token-by-token twins, and the outlier's tale."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_results import example_results
from grids import thinned
from numpy.typing import NDArray
from oracles import random_tokens, tiny_model
from tiny_runs import TEXT, write_text_run
from torch import Tensor, nn

from sinktrain import cli
from sinktrain.evaluation import quantized as quantized_module
from sinktrain.evaluation.pieces import with_sinks
from sinktrain.evaluation.quantized import Quantization, Variant
from sinktrain.evaluation.quantizers import (
    SCHEMES,
    QuantizedModel,
    Scheme,
    calibrate,
    linear_names,
    round_rows,
    round_rows_between_ends,
    round_to_range,
    sharing_copy,
)
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS, NullSlot
from sinktrain.report.figures.quantized import quantized_figures
from sinktrain.report.markdown import results_markdown
from sinktrain.report.page import report_page
from sinktrain.report.quantized_tables import quantized_measurement_table, quantized_table
from sinktrain.report.reading import results_validator
from sinktrain.report.terminal import terminal_table
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout

Floats = NDArray[np.float64]
SINK = 90
LAYOUT = Layout(2, 5)
VARIANTS = [variant for scheme in SCHEMES.values() for variant in Variant.of(scheme)]


def variant_id(variant: Variant) -> str:
    kept, counted = variant.in_full_precision, variant.in_statistics
    return f"{variant.scheme.name}-{'kept' if kept else 'rounded'}-{counted}"


# -- slow twins -------------------------------------------------------------------------------------


def plainly_rounded(row: Floats, scale: np.float32, zero: np.float32, lowest: int, highest: int) -> Floats:
    places = row * float(np.float32(1) / scale) + float(zero)
    integers = np.rint(places.astype(np.float32)).astype(np.float64)  # torch rounds to float32 first
    return (np.clip(integers, lowest, highest) - float(zero)) * float(scale)


def plain_symmetric(row: Floats, bits: int, largest: float | None = None) -> Floats:
    top = 2 ** (bits - 1) - 1
    scale = np.float32((np.abs(row).max() if largest is None else largest) / top)
    return plainly_rounded(row, scale, np.float32(0), -top, top)


def plain_between_ends(row: Floats, bits: int) -> Floats:
    scale = np.float32((row.max() - row.min()) / (2**bits - 1))
    return plainly_rounded(row, scale, np.float32(-row.min() / float(scale)), 0, 2**bits - 1)


class PlainLinear(nn.Module):
    """A quantised linear layer that gets one token at a time; notes what it got."""

    def __init__(self, linear: nn.Module, variant: Variant, num_slots: int, largest: float | None) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.exact, self.bias = linear.weight.numpy(), linear.bias.numpy()
        self.rounded = self.exact
        if variant.scheme.kind != "cache":
            self.rounded = np.stack([plain_symmetric(row, variant.scheme.bits) for row in self.exact])
        self.variant, self.num_slots, self.largest = variant, num_slots, largest
        self.inputs: list[Floats] = []

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[:2] == (1, 1)
        row: Floats = x[0, 0].numpy()
        is_kept = self.variant.in_full_precision and len(self.inputs) < self.num_slots
        self.inputs.append(row)
        if self.variant.scheme.kind == "cache" or is_kept:
            out = self.exact @ row
        else:
            out = self.rounded @ plain_symmetric(row, self.variant.scheme.bits, self.largest)
        return torch.from_numpy(out + self.bias)[None, None]


class ListedCache:
    """Attention of one stream, token by token: rotated keys and values in lists, rounded if they are."""

    def __init__(self, model: GPTNeoX, layout: Layout, variant: Variant, num_slots: int) -> None:
        self.network, self.layout = model.config.network, layout
        self.variant, self.num_slots = variant, num_slots
        self.kept: dict[int, list[tuple[int, Floats, Floats]]] = {}  # of each layer: age, key, value
        self.ages: dict[int, int] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, null: NullSlot | None = None) -> Tensor:
        age = self.ages.get(layer, 0)
        self.ages[layer] = age + 1
        query, key, value = (part[0, :, 0].numpy() for part in (q, k, v))  # each [head, head_dim]
        key = self.rotated(key, age)
        rounds = self.variant.scheme.kind == "cache"
        if rounds and not (self.variant.in_full_precision and age < self.num_slots):
            bits = self.variant.scheme.bits
            key, value = (np.stack([plain_between_ends(row, bits) for row in part]) for part in (key, value))
        slots = [*self.kept.get(layer, []), (age, key, value)]
        slots = [slot for slot in slots if slot[0] < self.layout.sinks or slot[0] > age - self.layout.window]
        self.kept[layer] = slots
        at_ring, at_sinks = (
            self.rotated(query, place) for place in (age, min(age, self.layout.num_slots - 1))
        )
        scores = [
            ((at_sinks if slot_age < self.layout.sinks else at_ring) * slot_key).sum(axis=1)
            for slot_age, slot_key, _ in slots
        ]
        values = [slot_value for _, _, slot_value in slots]
        shape, root = query.shape, math.sqrt(query.shape[1])
        if null is not None:
            null_key, null_value = (
                np.zeros(shape) if part is None else part.numpy() for part in (null.key, null.value)
            )
            own = (at_sinks * self.rotated(null_key, -1)).sum(axis=1)
            scores.append(own if null.score is None else own + root * null.score.numpy())
            values.append(null_value)
        weights = np.exp(np.stack(scores) / root)
        mixed = (weights[:, :, None] * np.stack(values)).sum(axis=0) / weights.sum(axis=0)[:, None]
        return torch.from_numpy(mixed)[None, :, None]

    def rotated(self, x: Floats, place: int) -> Floats:
        half = self.network.rotary_ndims // 2
        angle = place * self.network.rotary_emb_base ** (-np.arange(half) / half)
        turned = x[:, :half] + 1j * x[:, half : 2 * half]
        turned = turned * np.exp(1j * angle)
        return np.concatenate((turned.real, turned.imag, x[:, 2 * half :]), axis=1)


@torch.no_grad()
def plain_losses(
    model: GPTNeoX,
    tokens: Tensor,
    layout: Layout,
    variant: Variant,
    num_slots: int,
    largest: dict[str, float] | None = None,
) -> tuple[Floats, dict[str, list[Floats]]]:
    """Losses of each next token, float64[batch, seq - 1], and all that each linear layer got."""
    rows, inputs = [], {name: [] for name in linear_names(model)}
    for row in tokens:
        twin = sharing_copy(model)
        for name in inputs:
            linear = PlainLinear(
                twin.get_submodule(name), variant, num_slots, None if largest is None else largest[name]
            )
            twin.set_submodule(name, linear)
        cache = ListedCache(model, layout, variant, num_slots)
        logits = torch.cat([twin.logits(twin.hidden(token[None, None], cache)) for token in row], dim=1)[0]
        rows.append(-logits.log_softmax(dim=-1)[:-1].gather(1, row[1:, None])[:, 0].numpy())
        for name, got in inputs.items():
            got.append(np.stack(twin.get_submodule(name).inputs))  # type: ignore[arg-type]
    return np.stack(rows), inputs


# -- rounding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_equals_plain_loops(bits: int) -> None:
    x = torch.randn(7, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) * 5 + 2
    x[0, 0] += 40  # a row far from zero
    for rounded, plain in (
        (round_rows(x, bits), lambda row: plain_symmetric(row, bits)),
        (round_rows_between_ends(x, bits), lambda row: plain_between_ends(row, bits)),
        (round_to_range(x, 3.0, bits), lambda row: plain_symmetric(row, bits, 3.0)),
    ):
        expected = np.apply_along_axis(plain, 2, x.numpy())
        np.testing.assert_allclose(rounded.numpy(), expected, rtol=0, atol=2e-5)


def test_rounding_is_off_by_half_a_step_at_most_and_takes_no_more_values_than_bits_allow() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    for bits in (4, 8):
        between = round_rows_between_ends(x, bits)
        step = (x.amax(1) - x.amin(1)) / (2**bits - 1)
        assert ((between - x).abs().amax(1) <= step * 0.5001).all()
        assert max(len(row.unique()) for row in between) <= 2**bits
        symmetric = round_rows(x, bits)
        step = x.abs().amax(1) / (2 ** (bits - 1) - 1)
        assert ((symmetric - x).abs().amax(1) <= step * 0.5001).all()
        assert max(len(row.unique()) for row in symmetric) <= 2**bits - 1


def test_rows_of_one_value_come_through() -> None:
    x = torch.tensor([[0.0] * 8, [3.25] * 8, [-1e-20] * 8, [1e20] * 8])
    for rounded in (round_rows_between_ends(x, 4), round_rows(x, 8)):
        np.testing.assert_allclose(rounded.numpy(), x.numpy(), rtol=1e-5)


def test_what_is_larger_than_statistics_say_is_cut_off() -> None:
    x = torch.tensor([[-9.0, -2.0, 0.5, 9.0]])
    rounded = round_to_range(x, 2.0, 8)
    np.testing.assert_allclose(rounded.numpy(), [[-2.0, -2.0, 0.5, 2.0]], rtol=0, atol=0.01)


# -- models -----------------------------------------------------------------------------------------


def assert_equals_twin(model: GPTNeoX, layout: Layout, variant: Variant) -> None:
    tokens = with_sinks(model, random_tokens(1, 20, seed=5).numpy())
    largest = None
    if variant.in_statistics is not None:
        largest = calibrate(model, tokens[:, :9], layout, 2).largest(variant.in_statistics)
    expected, _ = plain_losses(model, tokens, layout, variant, 2, largest)
    rounded = QuantizedModel(model, variant.scheme, 2, variant.in_full_precision, largest)
    losses = rounded.losses(tokens, layout).numpy()
    exact = stream_loss(model, tokens, layout.sinks, layout.window).numpy()
    is_scored = ~np.isnan(exact)
    # torch rounds what one scale gives to float32, also where it got float64
    tolerance = 5e-6 if variant.scheme.kind == "static" else 1e-10
    assert np.abs(losses - expected)[is_scored].max() < tolerance
    assert np.abs(losses - exact)[is_scored].max() > 1e-4


@pytest.mark.parametrize(("kind", "name"), thinned(sorted(KINDS), list(SCHEMES), times=2))
def test_blocks_equal_token_by_token_with_lists(name: str, kind: str) -> None:
    assert_equals_twin(tiny_model(kind=kind).requires_grad_(False), LAYOUT, Variant.of(SCHEMES[name])[-1])


@pytest.mark.parametrize("layout", [LAYOUT, Layout(0, 64)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_every_variant_equals_token_by_token_with_lists(variant: Variant, layout: Layout) -> None:
    """Streaming and dense; slots that stay in full precision need not be those that the layout keeps."""
    assert_equals_twin(tiny_model(sinks=(SINK,)).requires_grad_(False), layout, variant)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_size_of_blocks_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting streams elsewhere moves the slots of sinks between blocks; streams begin anew each time."""
    model = tiny_model(sinks=(SINK,))
    tokens = with_sinks(model, random_tokens(2, 20).numpy())
    largest = dict.fromkeys(linear_names(model), 2.0)
    rounded = QuantizedModel(model, SCHEMES[name], 3, keeps_sinks=True, largest=largest)
    whole = rounded.losses(tokens, LAYOUT)
    for block_size in (2, 7):
        monkeypatch.setattr(
            "sinktrain.evaluation.quantizers.stream_loss",
            lambda *given, block_size=block_size: stream_loss(*given, block_size=block_size),
        )
        again = rounded.losses(tokens, LAYOUT)
        assert torch.allclose(again, whole, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("kind", ["static", "token", "cache"])
def test_many_bits_change_nothing(kind: Any) -> None:
    model = tiny_model(sinks=(SINK,))
    tokens = with_sinks(model, random_tokens(2, 40).numpy())
    largest = calibrate(model, tokens, LAYOUT, 1).largest(with_sinks=True)
    rounded = QuantizedModel(model, Scheme("fine", kind, 20), 1, keeps_sinks=False, largest=largest)
    exact = stream_loss(model, tokens, LAYOUT.sinks, LAYOUT.window)
    difference = (rounded.losses(tokens, LAYOUT) - exact).nan_to_num().abs().max()
    assert 0 < difference < 1e-3


@pytest.mark.parametrize("name", SCHEMES)
def test_a_stream_of_nothing_but_kept_slots_is_that_of_the_original(name: str) -> None:
    model = tiny_model(sinks=(SINK,))
    tokens = with_sinks(model, random_tokens(2, 5).numpy())
    largest = dict.fromkeys(linear_names(model), 1.0)
    exact = stream_loss(model, tokens, 6, 4)
    for keeps in (True, False):
        rounded = QuantizedModel(model, SCHEMES[name], 6, keeps, largest).losses(tokens, Layout(6, 4))
        assert torch.allclose(rounded, exact, rtol=0, atol=1e-12, equal_nan=True) == keeps


def test_the_original_stays_as_it_is() -> None:
    model = tiny_model(sinks=(SINK,))
    tokens = with_sinks(model, random_tokens(2, 20).numpy())
    before = stream_loss(model, tokens, 1, 8)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    largest = calibrate(model, tokens, Layout(1, 8), 1).largest(with_sinks=True)
    for scheme in SCHEMES.values():
        rounded = QuantizedModel(model, scheme, 1, keeps_sinks=False, largest=largest)
        rounded.losses(tokens, Layout(1, 8))
        embedding = rounded.model.embed_out.weight
        assert embedding.data_ptr() == model.embed_out.weight.data_ptr()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(stream_loss(model, tokens, 1, 8).nan_to_num(), before.nan_to_num())


def test_calibration_finds_what_the_layers_get_in_and_outside_the_slots() -> None:
    model = tiny_model(sinks=(SINK,))
    tokens = with_sinks(model, random_tokens(3, 25).numpy())
    found = calibrate(model, tokens, LAYOUT, 2)
    exactly = Variant(Scheme("none", "cache", 8), True, None)
    _, inputs = plain_losses(model, tokens, LAYOUT, exactly, num_slots=len(tokens[0]))
    for name, rows in inputs.items():
        sizes = np.abs(np.stack(rows))  # [batch, seq, in]
        assert found.in_sinks[name] == pytest.approx(sizes[:, :2].max(), abs=1e-10)
        assert found.elsewhere[name] == pytest.approx(sizes[:, 2:].max(), abs=1e-10)
        assert found.largest(True)[name] == max(found.in_sinks[name], found.elsewhere[name])
        assert found.largest(False)[name] == found.elsewhere[name]


# -- the study --------------------------------------------------------------------------------------


def with_outlier() -> GPTNeoX:
    """A model whose sink token lights up one neuron some thousandfold, to no effect."""
    model = tiny_model(sinks=(SINK,), max_position_embeddings=64)
    layer = model.gpt_neox.layers[0]
    embedding = model.gpt_neox.embed_in.weight
    embedding[:, 0] = 0
    embedding[SINK] = torch.eye(embedding.shape[1])[0].to(embedding)
    up, down = layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
    up.weight[5] = 0
    up.weight[5, 0] = 1000
    up.bias[5] = -2000
    down.weight[:, 5] = 0
    return model


def own_text(model: GPTNeoX, num_streams: int, length: int) -> NDArray[np.int64]:
    """What a model itself says, which it cannot predict better than it does: rounding can only cost."""
    generator = torch.Generator().manual_seed(11)
    decoder = StreamingDecoder(model, 1, 31, batch_size=num_streams)
    logits, text = decoder.step(torch.full((num_streams,), SINK)), []
    for _ in range(length):
        token = torch.multinomial(logits[:, :SINK].softmax(dim=-1), 1, generator=generator)[:, 0]
        text.append(token)
        logits = decoder.step(token)
    return torch.stack(text, dim=1).numpy()


@pytest.fixture(scope="module")
def planted() -> dict[tuple[Any, ...], dict[str, Any]]:
    with torch.no_grad():
        model = with_outlier()
        study = Quantization(lambda: model, own_text(model, 8, 160), 32)
        rows = [row for scheme in SCHEMES.values() for row in study.rows(scheme)]
    keys = ("scheme", "policy", "sink_in_statistics", "sink_in_full_precision")
    return {tuple(row[key] for key in keys): row for row in rows}


@pytest.mark.parametrize("policy", ["streaming", "dense"])
@pytest.mark.parametrize("keeps", [True, False])
def test_an_outlier_in_the_sinks_slot_spoils_the_scales_of_all_others(
    planted: dict[tuple[Any, ...], dict[str, Any]], policy: str, keeps: bool
) -> None:
    with_sink = planted["w8a8-static", policy, True, keeps]
    without = planted["w8a8-static", policy, False, keeps]
    by_token = planted["w8a8-token", policy, None, keeps]
    assert with_sink["ci95"][0] > 0.05
    for other in (without, by_token):
        assert abs(other["delta_nats"]) < 0.1 * with_sink["delta_nats"]


def test_rows_say_what_was_measured(planted: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    assert len(planted) == 2 * (4 + 2 + 2 + 2)
    for row in planted.values():
        is_dense = row["policy"] == "dense"
        assert (row["sinks"], row["window"]) == ((0, 64) if is_dense else (1, 31))
        assert row["num_sink_slots"] == 1
        assert row["tokens_scored"] == (8 * 2 * (63 - 8) if is_dense else 8 * 128)
        assert row["calibration_tokens"] == (8 * 32 if row["scheme"] == "w8a8-static" else None)
        assert row["delta_nats"] == pytest.approx(row["quantized_loss_nats"] - row["loss_nats"], abs=1e-12)
        assert row["ci95"][0] <= row["delta_nats"] <= row["ci95"][1]
        assert (row["interval"], row["dtype"]) == ("text", "float64")


def test_fewer_bits_cost_more(planted: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    for policy in ("streaming", "dense"):
        for keeps in (True, False):
            eight, four = (planted[name, policy, None, keeps] for name in ("kv8", "kv4"))
            assert four["delta_nats"] > 5 * abs(eight["delta_nats"])


def test_what_is_scored_was_not_calibrated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(sinks=(SINK,), max_position_embeddings=32)
    streams = (np.arange(3 * 104) % 89).reshape(3, 104)
    read: list[Tensor] = []

    def reading(model: GPTNeoX, tokens: Tensor, layout: Layout, num_slots: int) -> Any:
        read.append(tokens)
        return calibrate(model, tokens, layout, num_slots)

    monkeypatch.setattr(quantized_module, "calibrate", reading)
    for num_slots, expected in ((12, 13), (40, 40)):
        study = Quantization(lambda: model, streams, num_slots)
        study.rows(SCHEMES["w8a8-static"])
        assert torch.equal(read[-1], with_sinks(model, streams[:, :expected]))
        streaming, dense = (reading for reading, _ in study.full_precision)
        assert torch.equal(streaming.tokens[:, 1:], torch.from_numpy(streams))
        assert streaming.num_scored == 104 - expected
        after = streams[:, expected:]
        pieces = after[:, : after.shape[1] // 31 * 31].reshape(-1, 31)
        assert torch.equal(dense.tokens, with_sinks(model, pieces))
        assert dense.num_scored == 31 - 8
    assert len(read) == 2  # once a study


def test_a_vanilla_model_keeps_its_first_four_tokens() -> None:
    model = tiny_model(max_position_embeddings=32)
    rows = Quantization(lambda: model, random_tokens(2, 100).numpy(), 16).rows(SCHEMES["kv4"])
    assert [(row["policy"], row["sinks"], row["window"], row["num_sink_slots"]) for row in rows] == 2 * [
        ("streaming", 4, 12, 4),
        ("dense", 0, 32, 4),
    ]
    assert rows[0]["quantized_loss_nats"] != rows[2]["quantized_loss_nats"]


def test_readings_without_tokens_to_score_are_left_out() -> None:
    model = tiny_model(sinks=(SINK,), max_position_embeddings=32)
    rows = Quantization(lambda: model, random_tokens(1, 35).numpy(), 16).rows(SCHEMES["kv8"])
    assert [row["policy"] for row in rows] == ["streaming", "streaming"]
    assert not Quantization(lambda: model, random_tokens(1, 20).numpy(), 16).rows(SCHEMES["kv8"])


# -- the command and the report ---------------------------------------------------------------------


def evaluated(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    arguments = ["--text", str(folder / "text.txt"), "--out", str(folder / "out"), "--tasks", "none"]
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder / "sink"), *arguments, *options, "--json"]) == 0
    results: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(results_validator().iter_errors(results)) == []
    return results


def test_evaluate_quantizes_when_asked_and_keeps_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, whatever the table is measured in."""
    (tmp_path / "text.txt").write_text(TEXT)
    write_text_run(tmp_path / "sink", 1)
    options = ("--dtype", "bfloat16", "--streams", "2", "--layouts", "0+12", "--policies", "streaming")
    rows = evaluated(tmp_path, capsys, *options, "--quantize", "all")["quantized"]
    assert list(dict.fromkeys(row["scheme"] for row in rows)) == list(SCHEMES)
    assert {(row["model"], row["text"], row["dtype"]) for row in rows} == {("sink", "text.txt", "float32")}
    streaming = {(row["sinks"], row["window"]) for row in rows if row["policy"] == "streaming"}
    assert streaming == {(1, 11)}
    monkeypatch.delattr(Quantization, "full_precision")
    again = evaluated(tmp_path, capsys, *options, "--quantize", "kv4,w8a8-token")["quantized"]
    assert again == [row for name in ("kv4", "w8a8-token") for row in rows if row["scheme"] == name]


def test_tables_have_every_variant_of_every_model() -> None:
    results = example_results(texts=("a.txt", "b.txt"))
    table = quantized_table(results, "a.txt")
    assert table.header[2:6] == [
        "w8a8-static: all rounded",
        "w8a8-static: sink exact",
        "w8a8-static: scales without sink",
        "w8a8-static: scales without sink, sink exact",
    ]
    assert len(table.header) == 2 + len(VARIANTS)
    assert [row[:2] for row in table.rows] == [
        ["vanilla", "4+60"],
        ["vanilla", "dense"],
        ["sink", "1+63"],
        ["sink", "dense"],
    ]
    rows = [row for row in results["quantized"] if row["text"] == "a.txt"]
    assert table.rows[0][2] == "+0.223 (+0.211 to +0.235)"
    first = quantized_measurement_table(rows).rows[0]
    assert first[:5] == ["vanilla", "w8a8-static", "all rounded", "4+60", "16,128"]
    assert float(first[6]) - float(first[5]) == pytest.approx(rows[0]["delta_nats"], abs=0.0011)
    assert first[7:] == ["+0.223", "+0.211 to +0.235", "< 0.001"]


def test_reports_tell_of_quantisation_only_where_it_was_measured() -> None:
    results = example_results()
    assert "## Quantisation on book.txt" in results_markdown(results)
    assert "<h2" in report_page(results).split("Quantisation on book.txt in numbers")[0]
    line = "quantised w8a8-static, nats (with the sink's slots apart): vanilla +0.223 (+0.0074), sink +0.134"
    assert line in terminal_table(results, width=1000)
    without = {**results, "quantized": []}
    for report in (results_markdown(without), report_page(without), terminal_table(without)):
        assert "uantis" not in report


def test_each_scheme_has_a_plot_whose_streaming_rows_come_first() -> None:
    figures = quantized_figures(example_results(), "book.txt")
    assert [figure.name for figure in figures] == [f"quantized/book.txt/{name}" for name in SCHEMES]
    assert figures[1].layout["yaxis"]["categoryarray"] == [
        "streaming, all rounded",
        "streaming, sink exact",
        "dense, all rounded",
        "dense, sink exact",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_cuda_gives_the_losses_of_the_cpu(variant: Variant) -> None:
    """Values at the border of two integers may fall to either side."""
    model = tiny_model(sinks=(SINK,), dtype=torch.float32)
    tokens = with_sinks(model, random_tokens(4, 200).numpy())
    largest = None
    if variant.in_statistics is not None:
        largest = calibrate(model, tokens[:, :50], Layout(1, 31), 1).largest(variant.in_statistics)
    losses = []
    for device in ("cpu", "cuda"):
        rounded = QuantizedModel(model.to(device), variant.scheme, 1, variant.in_full_precision, largest)
        losses.append(rounded.losses(tokens, Layout(1, 31)).cpu().nan_to_num())
    difference = (losses[0] - losses[1]).abs()
    assert difference.mean() < 2e-3
    assert difference.median() < 1e-4
