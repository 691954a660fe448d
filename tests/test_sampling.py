"""Sampling against transformers' logits processors, and draws against the probabilities they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinktrain.errors import StreamError
from sinktrain.streaming import sampling
from sinktrain.streaming.sampling import Sampling, sample

NUM_DRAWS = 20_000
SUPPRESSED, RECENT = [2, 9], [3, 3, 0, 7, 2]


def needs_cuda(test: Any) -> Any:
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    )


def random_logits(rows: int = 4, vocab: int = 50) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 2


def draws(logits: Tensor, settings: Sampling, num_draws: int = NUM_DRAWS, **options: Any) -> Tensor:
    """What many draws from one row give."""
    generator = torch.Generator(logits.device).manual_seed(1)
    return sample(logits.expand(num_draws, -1), settings, generator=generator, **options)


def drawn_tokens(logits: Tensor, settings: Sampling, **options: Any) -> set[int]:
    return set(draws(logits, settings, **options).tolist())


def mask_of(ids: list[int], vocab: int) -> Tensor:
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[ids] = True
    return mask


def assert_frequencies(tokens: Tensor, probabilities: Tensor) -> None:
    """Nothing improbable is drawn, and every frequency is within 4.5 standard deviations."""
    expected = probabilities.double() * len(tokens)
    found = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert found[expected == 0].sum() == 0
    deviation = (expected * (1 - probabilities.double())).sqrt().clamp(min=1)
    assert ((found - expected).abs() / deviation).max() < 4.5


def as_transformers(logits: Tensor, settings: Sampling) -> Tensor:
    """Probabilities that ``generate`` draws with, its processors in its order."""
    processors: list[Any] = [
        RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        SuppressTokensLogitsProcessor(SUPPRESSED),
        TemperatureLogitsWarper(settings.temperature),
    ]
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        processors.append(MinPLogitsWarper(settings.min_p))
    scores: Tensor = LogitsProcessorList(processors)(torch.tensor([RECENT]), logits[None].clone())
    return scores[0].softmax(-1)


# -- as transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(),
        Sampling(0.7),
        Sampling(4.0),
        Sampling(top_k=1),
        Sampling(3.0, top_k=5),
        Sampling(top_k=1000),
        Sampling(top_p=0.1),
        Sampling(top_p=0.5),
        Sampling(top_p=0.95),
        Sampling(min_p=0.0),
        Sampling(min_p=0.1),
        Sampling(min_p=1.0),
        Sampling(repetition_penalty=1.3),
        Sampling(repetition_penalty=0.5),
        Sampling(1.5, top_p=0.8),
        Sampling(2.5, min_p=0.2),
        Sampling(2.0, top_k=8, top_p=0.7),
        Sampling(3.0, top_p=0.9, min_p=0.3),
        Sampling(2.0, 12, 0.9, 0.05, 1.2),
        Sampling(0.6, 6, 0.97, 0.02, 0.8),
    ],
    ids=str,
)
def test_draws_have_the_probabilities_that_transformers_gives(settings: Sampling) -> None:
    for logits in random_logits(rows=2, vocab=20).double():
        expected = as_transformers(logits, settings)
        recent = torch.tensor([[*RECENT, -1, -1]]).expand(NUM_DRAWS, -1)
        tokens = draws(logits, settings, suppress=mask_of(SUPPRESSED, 20), recent=recent)
        assert_frequencies(tokens, expected)
        assert set(tokens.tolist()) >= set((expected > 1e-3).nonzero()[:, 0].tolist())


def test_temperature_zero_takes_the_most_probable_token_after_the_penalty() -> None:
    logits = random_logits(rows=1)
    first, second = logits[0].topk(2).indices.tolist()
    assert sample(logits, Sampling(0)).tolist() == [first]
    recent = torch.tensor([[first, -1]])
    assert sample(logits, Sampling(0, repetition_penalty=9.0), recent=recent).tolist() == [second]


def test_tokens_that_tie_with_the_last_of_top_k_stay_as_in_transformers() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert drawn_tokens(logits, Sampling(top_k=2)) == {0, 1, 2, 3}


def test_top_p_of_almost_nothing_keeps_the_most_probable_token_and_one_keeps_all() -> None:
    logits = random_logits()[0]
    assert drawn_tokens(logits, Sampling(top_p=1e-9)) == {int(logits.argmax())}
    assert drawn_tokens(torch.zeros(8), Sampling(top_p=1.0)) == set(range(8))


@pytest.mark.parametrize("spreads", [[6.0], [2.0], [0.1], [6.0, 2.0], [2.0, 6.0, 0.1]])
def test_a_nucleus_is_the_same_however_many_tokens_are_ranked(spreads: list[float]) -> None:
    """By its spread a row needs a few of 6,000 tokens, hundreds, or nearly all of them."""
    logits = random_logits(len(spreads), 6000).double() * torch.tensor(spreads)[:, None] / 2
    kept, ids = sampling._nucleus(logits, 1.0, 0.9)
    for row, expected in enumerate(TopPLogitsWarper(0.9)(None, logits)):
        found = torch.full_like(expected, -torch.inf).scatter(0, ids[row], kept[row])
        assert torch.equal(found, expected)


# -- the penalty ----------------------------------------------------------------------------------


def test_each_row_is_penalised_for_its_own_tokens_once_and_empty_slots_for_none() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]] * 3)
    recent = torch.tensor([[0, 0, 1], [-1, -1, -1], [-1, 3, 2]])
    expected = torch.tensor([[1.0, -4.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 0.5, 0.0]])
    assert torch.equal(sampling._penalise(logits, recent, 2.0), expected)
    assert logits[0, 0] == 2  # they are the caller's


def test_without_recent_tokens_there_is_nothing_to_penalise() -> None:
    logits = random_logits()
    assert torch.equal(sample(logits, Sampling(0, repetition_penalty=5.0)), logits.argmax(-1))


# -- never drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(0),
        Sampling(1e-300),
        Sampling(1e300),
        Sampling(top_k=1),
        Sampling(top_k=5),
        Sampling(top_p=1e-6),
        Sampling(1e300, top_p=0.99),
        Sampling(1e-300, top_p=0.99),
        Sampling(1e300, min_p=0.5),
        Sampling(min_p=0.0),
        Sampling(min_p=1.0),
        Sampling(1e300, 6, 0.999, 1e-9, 1e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("draw", ["_race", "_invert"])
def test_suppressed_ids_are_never_drawn(
    settings: Sampling, draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they are the most probable, and fewer are left than top_k asks for."""
    monkeypatch.setattr(sampling, "_invert", getattr(sampling, draw))
    logits = torch.tensor([0.0, -5.0, 50.0, 0.0, -5.0, 50.0])
    options = {"suppress": mask_of([2, 4, 5], 6), "recent": torch.tensor([[2, -1]]).expand(1000, -1)}
    assert drawn_tokens(logits, settings, num_draws=1000, **options) <= {0, 1, 3}


def test_all_but_one_suppressed_leaves_that_one() -> None:
    suppress = ~mask_of([4], 6)
    for settings in (Sampling(0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.5)):
        assert drawn_tokens(torch.zeros(6), settings, num_draws=200, suppress=suppress) == {4}


# -- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [sampling._race, sampling._invert])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_both_draws_have_the_frequencies_of_the_softmax(draw: Any, temperature: float) -> None:
    logits = random_logits(rows=1, vocab=12)
    logits[0, 5] = -torch.inf
    tokens = draw(logits.expand(NUM_DRAWS, -1), temperature, torch.Generator().manual_seed(0))
    assert_frequencies(tokens, (logits[0] / temperature).softmax(-1))


@pytest.mark.parametrize("uniform", [0.0, 2.0**-60, 1 - 2.0**-53])
def test_the_first_and_last_numbers_that_can_be_drawn_fall_on_tokens_that_may_be(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    logits = random_logits(rows=1000)
    tokens = sample(logits, Sampling(), suppress=mask_of([0, 1, 48, 49], 50))
    assert set(tokens.tolist()) == ({2} if uniform < 0.5 else {47})


def test_rows_are_drawn_independently() -> None:
    tokens = draws(torch.zeros(2), Sampling()).view(-1, 2)
    assert_frequencies(tokens[:, 0] * 2 + tokens[:, 1], torch.full((4,), 0.25))


@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.8, 5, 0.9, 0.1)], ids=str)
def test_same_seed_draws_the_same_and_another_seed_differs(settings: Sampling) -> None:
    logits = torch.zeros(64, 50)
    first, again, other = (
        sample(logits, settings, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_sampled_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits(rows=500).to(dtype)
    first, second = (
        sample(x, Sampling(0.9, 9, 0.9, 0.01), generator=torch.Generator().manual_seed(0))
        for x in (logits, logits.float())
    )
    assert torch.equal(first, second)


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits()
    before = logits.clone()
    options = {"suppress": mask_of([1], 50), "recent": torch.tensor([[1, 2, 3, -1]] * 4)}
    sample(logits, Sampling(0.8, 9, 0.9, 0.01, 1.2), **options)
    assert torch.equal(logits, before)


# -- on CUDA --------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize(
    "settings", [Sampling(0), Sampling(0.7), Sampling(2.0, 12, 0.9, 0.05, 1.2), Sampling(top_p=0.9)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_captured_graph_draws_anew_with_the_right_probabilities(
    settings: Sampling, dtype: torch.dtype
) -> None:
    row = random_logits(rows=1, vocab=20)[0].to(dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    logits = row.cuda().expand(NUM_DRAWS // 10, -1).contiguous()
    options: dict[str, Any] = {
        "suppress": mask_of(SUPPRESSED, 20).cuda(),
        "recent": torch.tensor([[*RECENT, -1]]).cuda().expand(len(logits), -1).contiguous(),
        "generator": generator,
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            sample(logits, settings, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        drawn = sample(logits, settings, **options)
    rounds = []
    for _ in range(10):
        graph.replay()
        rounds.append(drawn.cpu())
    if settings.temperature == 0:
        penalised = sample(
            row[None], settings, suppress=mask_of(SUPPRESSED, 20), recent=torch.tensor([RECENT])
        )
        assert all(torch.equal(tokens, penalised.expand(len(logits))) for tokens in rounds)
    else:
        assert not torch.equal(rounds[0], rounds[1])
        assert_frequencies(torch.cat(rounds), as_transformers(row.double(), settings))


@needs_cuda
def test_many_rare_tokens_get_the_share_that_they_have_together() -> None:
    """CUDA's float32 noise is never below 2**-24: with it they would get about two thirds."""
    vocab, tail = 20_000, 1e-3
    logits = torch.full((2000, vocab), tail / (vocab - 1), device="cuda").log()
    logits[:, 0] = 0
    generator = torch.Generator("cuda").manual_seed(0)
    num_rare = sum(int((sample(logits, Sampling(), generator=generator) > 0).sum()) for _ in range(500))
    assert 850 < num_rare < 1150  # 1000 expected


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; use 0 (most probable token) or more"),
        ({"temperature": float("nan")}, "temperature is nan; use 0 (most probable token) or more"),
        ({"temperature": float("inf")}, "temperature is inf; use 0 (most probable token) or more"),
        ({"top_k": 0}, "top_k is 0; use 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; use a probability above 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; use a probability above 0, at most 1"),
        ({"min_p": -0.1}, "min_p is -0.1; use a share from 0 to 1"),
        ({"min_p": 1.1}, "min_p is 1.1; use a share from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; use more than 0 (1 is none)"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf; use more than 0 (1 is none)"),
    ],
)
def test_settings_that_cannot_be_sampled_with_get_one_clear_line(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StreamError) as raised:
        Sampling(**settings)
    assert str(raised.value) == message
