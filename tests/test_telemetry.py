"""Sink metric, attention masses and hidden-state statistics equal plain loops over a slow twin's weights."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from every_kind import MODELS
from known_models import sink_seeker
from numpy.typing import NDArray
from oracles import attention_weights, model_with_every_part, random_tokens, tiny_model
from scipy.stats import kurtosis

from sinktrain.errors import DataError, ModelError
from sinktrain.evaluation import sink_metric as sink_metric_module
from sinktrain.evaluation import telemetry as telemetry_module
from sinktrain.evaluation.pieces import cut_pieces, spread
from sinktrain.evaluation.sink_metric import Observed, ObservedAttention, observe_texts, sink_metric
from sinktrain.evaluation.telemetry import Telemetry, initial_model, telemetry
from sinktrain.model.attention import CausalAttention
from sinktrain.model.init import initialize
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS, NullSlot

SEQ = 16
TEXTS = random_tokens(3, SEQ).numpy()
LAYERS, HEADS = 2, 2

Floats = NDArray[np.float64]


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> GPTNeoX:
    return tiny_model(**request.param)


def tokens_of(model: GPTNeoX, texts: NDArray[np.int64] = TEXTS) -> torch.Tensor:
    """The sequences that are looked at: sinks and as much text as keeps their length."""
    rows = [[*model.sink_ids, *row][: texts.shape[1]] for row in texts.tolist()]
    return torch.tensor(rows)


def importance_by_loop(weights: Floats) -> Floats:
    """float64[text, layer, head, query, key] -> float64[text, layer, head, key], one weight after another."""
    importance = np.zeros(weights.shape[:-1])
    num_texts, num_layers, num_heads, length, _ = weights.shape
    for text, layer, head in np.ndindex(num_texts, num_layers, num_heads):
        for key in range(length):
            total = 0.0
            for query in range(key, length):
                total += weights[text, layer, head, query, key]
            importance[text, layer, head, key] = total / (length - key)
    return importance


def null_mass_by_loop(weights: Floats) -> float:
    """The mean over rows of what float64[query, key] lack to 1."""
    return float(np.mean([1 - math.fsum(row) for row in weights]))


def looked_into(model: GPTNeoX, weights: str = "trained") -> Telemetry:
    found = telemetry(model, TEXTS, trained_length=SEQ)
    lists = (found.sink_metric, found.sink_attention, found.norms)
    return Telemetry(*([row for row in rows if row["weights"] == weights] for rows in lists))


def layer_inputs(model: GPTNeoX, tokens: torch.Tensor) -> list[Floats]:
    """What each layer and the last norm read: float64[text, seq, hidden] each, by walking the layers."""
    attend = CausalAttention(model.rotary_steps, tokens.shape[1], model.dtype)
    states = [model.gpt_neox.embed_in(tokens)]
    for index, layer in enumerate(model.gpt_neox.layers):
        states.append(layer(states[-1], index, attend))
    return [state.double().numpy() for state in states]


# -- the sink metric --------------------------------------------------------------------------------


def test_the_sink_metric_equals_a_plain_loop(model: GPTNeoX) -> None:
    weights = attention_weights(model, tokens_of(model))
    importance = importance_by_loop(weights)
    has_null = model.gpt_neox.layers[0].attention.sink.null_slot() is not None
    for eps in (0.05, 0.15, 0.3):
        expected, of_null = np.zeros(8), 0.0
        for text, layer, head in np.ndindex(len(TEXTS), LAYERS, HEADS):
            for key in range(8):
                expected[key] += importance[text, layer, head, key] > eps
            of_null += null_mass_by_loop(weights[text, layer, head]) > eps
        num_heads = len(TEXTS) * LAYERS * HEADS
        found = sink_metric(model, TEXTS, SEQ, eps)
        np.testing.assert_allclose(found.by_position, expected / num_heads, rtol=0, atol=1e-10)
        assert found.null == (pytest.approx(of_null / num_heads, abs=1e-10) if has_null else None)
        assert eps == 0.3 or max(expected) > 0


def test_heads_that_see_only_the_sink_give_one_there_and_zero_elsewhere() -> None:
    model = sink_seeker()
    np.testing.assert_array_equal(sink_metric(model, random_tokens(4, 64).numpy()).by_position, [1] + 7 * [0])


def test_the_indicator_is_taken_per_sequence_and_then_averaged() -> None:
    """One sequence of four with all weight on position 0 gives 0.25, though its mean weight is below eps."""
    model = sink_seeker(sinks=())
    sink = torch.zeros(32).double()
    sink[5], sink[6] = 1, -1
    model.gpt_neox.embed_in.weight[90] = sink
    texts = random_tokens(4, 64).numpy()
    texts[0, 0] = 90
    np.testing.assert_array_equal(sink_metric(model, texts).by_position, [0.25] + 7 * [0])


def test_even_attention_is_no_sink_at_64_tokens_and_one_at_8() -> None:
    """Importance of position 0 is then the mean of 1, 1/2, …, 1/T: 0.074 and 0.34."""
    model = sink_seeker(sinks=())
    texts = random_tokens(2, 64).numpy()
    assert sink_metric(model, texts, seq_len=64).by_position.tolist() == 8 * [0]
    assert sink_metric(model, texts, seq_len=8).by_position.tolist() == [1] + 7 * [0]
    assert sink_metric(model, texts, seq_len=64, eps=0.073).by_position[0] == 1


def test_only_as_much_text_as_fills_the_sequence_is_read() -> None:
    model = tiny_model(sinks=(90,))
    longer = np.concatenate((TEXTS, random_tokens(3, 5, seed=9).numpy()), axis=1)
    for eps in (0.05, 0.15):
        expected = sink_metric(model, TEXTS[:, : SEQ - 1], SEQ, eps).by_position
        np.testing.assert_array_equal(sink_metric(model, longer, SEQ, eps).by_position, expected)


@pytest.mark.parametrize(("texts", "seq_len"), [(TEXTS, 20), (TEXTS, 8), (TEXTS[:0], 16)], ids=str)
def test_texts_that_do_not_fill_a_sequence_are_refused(texts: NDArray[np.int64], seq_len: int) -> None:
    with pytest.raises(
        DataError, match=rf"^{len(texts)} texts of 16 tokens do not fill sequences of {seq_len}"
    ):
        sink_metric(tiny_model(sinks=(90,)), texts, seq_len)


# -- attention whose weights can be seen ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_null", [False, True], ids=["plain", "null slot"])
def test_observed_attention_mixes_as_causal_attention_does(dtype: torch.dtype, has_null: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 8, generator=generator).to(dtype) for _ in range(3))
    null = None
    if has_null:
        key, value = (torch.randn(3, 8, generator=generator).to(dtype) for _ in range(2))
        null = NullSlot(key, torch.tensor([-1.0, 0.3, 2.0]).to(dtype), value)
    steps = tiny_model().rotary_steps
    expected = CausalAttention(steps, 11, dtype)(0, q, k, v, null)
    mixed = ObservedAttention(steps, 11, dtype, lambda seen: None)(0, q, k, v, null)
    assert mixed.dtype == dtype
    atol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(mixed.double().numpy(), expected.double().numpy(), rtol=0, atol=atol)


def test_weights_are_float32_in_a_bfloat16_model() -> None:
    """bfloat16 weights of 64 even rows would add up to a visibly wrong importance."""
    told: list[torch.Tensor] = []
    zeros = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    attend = ObservedAttention(
        tiny_model().rotary_steps, 64, torch.bfloat16, lambda seen: told.append(seen.importance)
    )
    attend(0, zeros, zeros, zeros)
    exact = [math.fsum(1 / (row + 1) for row in range(key, 64)) / (64 - key) for key in range(64)]
    np.testing.assert_allclose(told[0][0, 0].numpy(), exact, rtol=1e-7)


def test_a_zero_sink_takes_as_much_of_even_attention_as_one_more_token() -> None:
    """Of row i, which sees i + 1 tokens, that is 1 / (i + 2)."""
    told: list[Observed] = []
    zeros = torch.zeros(1, 1, 64, 8)
    attend = ObservedAttention(tiny_model().rotary_steps, 64, torch.float32, told.append)
    attend(0, zeros, zeros, zeros, NullSlot())
    exact = [math.fsum(1 / (row + 2) for row in range(key, 64)) / (64 - key) for key in range(64)]
    np.testing.assert_allclose(told[0].importance[0, 0].numpy(), exact, rtol=1e-6)
    assert told[0].null_mass is not None
    assert float(told[0].null_mass) == pytest.approx(exact[0], rel=1e-6)


@pytest.mark.parametrize(("max_tokens", "max_weights"), [(1, 2**25), (2**13, 1), (2 * SEQ, 7 * 4 * SEQ)])
def test_measuring_in_parts_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, max_weights: int
) -> None:
    model = tiny_model(kind="kv_bias")
    whole = looked_into(model)
    monkeypatch.setattr(sink_metric_module, "MAX_TOKENS", max_tokens)
    monkeypatch.setattr(sink_metric_module, "MAX_WEIGHTS", max_weights)
    in_parts = looked_into(model)
    assert in_parts.sink_metric == whole.sink_metric
    for row, other in zip(in_parts.sink_attention, whole.sink_attention, strict=True):
        np.testing.assert_allclose(row["mass"], other["mass"], rtol=0, atol=1e-12)
        assert row["null_mass"] == pytest.approx(other["null_mass"], abs=1e-12)
        assert row["top_positions"] == other["top_positions"]
    for row, other in zip(in_parts.norms, whole.norms, strict=True):
        assert row.pop("weights") == other.pop("weights")
        assert row == pytest.approx(other, rel=1e-12)


# -- rows -------------------------------------------------------------------------------------------


def test_masses_and_top_positions_equal_a_plain_loop(model: GPTNeoX) -> None:
    importance = importance_by_loop(attention_weights(model, tokens_of(model))).mean(axis=0)
    rows = looked_into(model).sink_attention
    assert [(row["layer"], row["head"]) for row in rows] == list(np.ndindex(LAYERS, HEADS))
    for row in rows:
        received = importance[row["layer"], row["head"]]
        np.testing.assert_allclose(row["mass"], received[:8], rtol=0, atol=1e-10)
        own = sum(received[: len(model.sink_ids)])
        assert row["sink_mass"] == (pytest.approx(own, abs=1e-10) if model.sink_ids else None)
        eligible = [key for key in range(SEQ) if SEQ - key >= SEQ / 2]
        top = sorted(eligible, key=lambda key: -received[key])[:5]
        assert row["top_positions"] == top
        np.testing.assert_allclose(row["top_mass"], received[top], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_null_mass_is_what_the_rows_lack_to_one_or_is_called_a_proxy(kind: str) -> None:
    """Only weights of softmax over tokens alone add up to 1; there, what a gate shuts out stands for it."""
    model = tiny_model(kind=kind)
    weights = attention_weights(model, tokens_of(model))
    expected = np.zeros((LAYERS, HEADS))
    is_proxy = False
    for layer, states in enumerate(layer_inputs(model, tokens_of(model))[:-1]):
        block: Any = model.gpt_neox.layers[layer]
        scale = block.attention.sink.output_scale(block.input_layernorm(torch.from_numpy(states)))
        is_proxy = scale is not None
        for text, head in np.ndindex(len(TEXTS), HEADS):
            of_text = null_mass_by_loop(weights[text, layer, head])
            if is_proxy:
                assert abs(of_text) < 1e-12
                of_text = 1 - math.fsum(scale[text, :, head].tolist()) / SEQ
            expected[layer, head] += of_text / len(TEXTS)
    rows = looked_into(model).sink_attention
    np.testing.assert_allclose([row["null_mass"] for row in rows], expected.ravel(), rtol=0, atol=1e-10)
    assert {row["null_mass_is_proxy"] for row in rows} == {is_proxy}
    if kind in ("none", "token"):
        assert {row["null_mass"] for row in rows} == {0.0}
    else:
        assert min(row["null_mass"] for row in rows) > 0.01


def test_a_kind_that_used_every_part_would_be_seen_right_and_have_no_proxy() -> None:
    model = model_with_every_part()
    weights = attention_weights(model, tokens_of(model))
    importance = importance_by_loop(weights)
    told: list[Observed] = []
    observe_texts(model, TEXTS, SEQ, told.append)
    assert [seen.layer for seen in told] == list(range(LAYERS))
    for seen in told:
        assert seen.null_mass is not None
        assert not seen.is_proxy
        np.testing.assert_allclose(seen.importance, importance[:, seen.layer], rtol=0, atol=1e-10)
        of_heads = [[null_mass_by_loop(head) for head in text[seen.layer]] for text in weights]
        np.testing.assert_allclose(seen.null_mass, of_heads, rtol=0, atol=1e-10)


def test_value_norm_ratios_equal_a_plain_loop() -> None:
    model = tiny_model(sinks=(90,))
    tokens = tokens_of(model)
    expected = np.zeros((LAYERS, HEADS))
    for layer, states in enumerate(layer_inputs(model, tokens)[:-1]):
        block: Any = model.gpt_neox.layers[layer]
        fused = block.attention.query_key_value(block.input_layernorm(torch.from_numpy(states)))
        values = fused.view(len(TEXTS), SEQ, HEADS, 3, -1)[:, :, :, 2].numpy()
        for text, head in np.ndindex(len(TEXTS), HEADS):
            norms = [math.sqrt(sum(entry**2 for entry in values[text, key, head])) for key in range(SEQ)]
            expected[layer, head] += norms[0] / (sum(norms) / SEQ) / len(TEXTS)
    rows = looked_into(model).sink_attention
    np.testing.assert_allclose([row["value_norm_ratio"] for row in rows], expected.ravel(), rtol=1e-12)


def test_a_head_on_the_sink_is_told_as_such() -> None:
    found = telemetry(sink_seeker(), random_tokens(4, 64).numpy(), trained_length=64)
    row = found.sink_attention[0]
    assert row["mass"] == [1] + 7 * [0]
    assert row["sink_mass"] == 1
    assert (row["top_positions"][0], row["top_mass"][0]) == (0, 1)
    assert row["value_norm_ratio"] == pytest.approx(0, abs=1e-12)


def test_hidden_statistics_equal_plain_ones(model: GPTNeoX) -> None:
    rows = looked_into(model).norms
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row, states in zip(rows, layer_inputs(model, tokens_of(model)), strict=True):
        norms = np.linalg.norm(states, axis=-1)
        assert row["hidden_norm_ratio"] == pytest.approx((norms[:, 0] / norms[:, 1:].mean(axis=1)).mean())
        for suffix, first in (("", 0), ("_without_first", max(1, len(model.sink_ids)))):
            entries = [state[first:].ravel() for state in states]
            largest = [np.abs(each).max() for each in entries]
            middle = [np.sort(np.abs(each))[(len(each) - 1) // 2] for each in entries]
            expected = {
                "kurtosis": np.mean([kurtosis(each, fisher=False) for each in entries]),
                "max_abs": np.mean(largest),
                "top1_over_median": np.mean(np.array(largest) / middle),
            }
            for name, value in expected.items():
                assert row[name + suffix] == pytest.approx(value, rel=1e-10), name + suffix


def test_rows_of_both_weights_are_whole_and_can_be_written(model: GPTNeoX) -> None:
    found = telemetry(model, TEXTS, trained_length=SEQ)
    json.dumps(vars(found), allow_nan=False)
    has_null = model.gpt_neox.layers[0].attention.sink.null_slot() is not None
    places = [*[-1] * has_null, *range(8)]
    num_sinks = len(model.sink_ids)
    assert [row["weights"] for row in found.sink_metric] == [
        weights for weights in ("trained", "initial") for _ in places
    ]
    assert [row["position"] for row in found.sink_metric] == 2 * places
    assert [row["is_sink"] for row in found.sink_metric] == 2 * [0 <= at < num_sinks for at in places]
    assert {row["eps"] for row in found.sink_metric} == {0.3}
    assert [row["weights"] for row in found.sink_attention] == 4 * ["trained"] + 4 * ["initial"]
    assert [row["weights"] for row in found.norms] == 3 * ["trained"] + 3 * ["initial"]
    for row in found.sink_metric + found.sink_attention + found.norms:
        assert (row["seq_len"], row["num_sequences"]) == (SEQ, len(TEXTS))


def test_long_streams_are_cut_into_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "METRIC_SEQUENCES", 6)
    monkeypatch.setattr(telemetry_module, "NUM_SEQUENCES", 3)
    found = telemetry(sink_seeker(length=100), random_tokens(2, 400).numpy(), trained_length=100)
    assert {(row["seq_len"], row["num_sequences"]) for row in found.sink_metric} == {(64, 6)}
    assert {(row["seq_len"], row["num_sequences"]) for row in found.norms} == {(100, 3)}


def test_a_bfloat16_model_gives_nearly_the_same_figures() -> None:
    exact, rough = (
        telemetry(tiny_model(sinks=(90,), dtype=dtype), TEXTS, trained_length=SEQ)
        for dtype in (torch.float64, torch.bfloat16)
    )
    for row, other in zip(exact.sink_attention, rough.sink_attention, strict=True):
        np.testing.assert_allclose(other["mass"], row["mass"], rtol=0, atol=0.05)
    for row, other in zip(exact.norms, rough.norms, strict=True):
        assert other["kurtosis"] == pytest.approx(row["kurtosis"], rel=0.05)


# -- the model and its twin at the start ------------------------------------------------------------


def test_the_model_is_left_as_it_was(model: GPTNeoX) -> None:
    model.requires_grad_(True).train()
    model.gpt_neox.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    telemetry(model, TEXTS, trained_length=SEQ)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_hooks_go_even_if_measuring_fails() -> None:
    model = tiny_model()
    with pytest.raises(IndexError):
        telemetry(model, TEXTS + 90, trained_length=SEQ)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_initial_model_is_what_training_starts_from(kind: str) -> None:
    model = tiny_model(kind=kind, dtype=torch.float32)
    expected = GPTNeoX(model.config)
    initialize(expected, 5)
    initial = initial_model(model, seed=5)
    assert initial.dtype == torch.float32
    for name, value in expected.state_dict().items():
        assert torch.equal(initial.state_dict()[name], value), name
    assert torch.equal(initial(tokens_of(model)), expected(tokens_of(model)))


def test_initial_rows_are_the_trained_rows_of_the_initial_model(model: GPTNeoX) -> None:
    found = telemetry(model, TEXTS, SEQ, initial_seed=3)
    alone = telemetry(initial_model(model, seed=3), TEXTS, SEQ)
    for name in ("sink_metric", "sink_attention", "norms"):
        initial = [row | {"weights": ""} for row in getattr(found, name) if row["weights"] == "initial"]
        trained = [row | {"weights": ""} for row in getattr(alone, name) if row["weights"] == "trained"]
        assert initial == trained


def test_a_damaged_model_is_refused() -> None:
    model = tiny_model()
    block: Any = model.gpt_neox.layers[1]
    block.attention.query_key_value.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"^layer 1 of the trained network gives values that are not finite"):
        telemetry(model, TEXTS, trained_length=SEQ)


# -- pieces of text ---------------------------------------------------------------------------------


def test_pieces_are_spread_over_the_texts_and_do_not_overlap() -> None:
    texts = np.arange(2 * 11).reshape(2, 11)
    assert cut_pieces(texts, 5, most=9).tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [11, 12, 13, 14, 15],
        [16, 17, 18, 19, 20],
    ]
    assert cut_pieces(texts, 5, most=2)[:, 0].tolist() == [0, 11]
    assert cut_pieces(texts, 11, most=2)[:, 0].tolist() == [0, 11]


@pytest.mark.parametrize(("total", "most"), [(0, 5), (1, 5), (100, 100), (101, 100), (7, 3)])
def test_spread_indices_are_distinct_and_in_range(total: int, most: int) -> None:
    indices = spread(total, most)
    assert len(set(indices.tolist())) == min(total, most)
    assert all(0 <= index < total for index in indices)


# -- CUDA -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_gives_the_same_figures_as_the_cpu(model: GPTNeoX) -> None:
    on_cpu = looked_into(model)
    on_cuda = looked_into(model.cuda())
    assert on_cuda.sink_metric == on_cpu.sink_metric
    for row, other in zip(on_cuda.sink_attention, on_cpu.sink_attention, strict=True):
        np.testing.assert_allclose(row["mass"], other["mass"], rtol=0, atol=1e-10)
        assert row["null_mass"] == pytest.approx(other["null_mass"], abs=1e-10)
        assert row["value_norm_ratio"] == pytest.approx(other["value_norm_ratio"], rel=1e-10)
    for row, other in zip(on_cuda.norms, on_cpu.norms, strict=True):
        assert row.pop("weights") == other.pop("weights")
        assert row == pytest.approx(other, rel=1e-10)
