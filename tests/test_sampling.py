"""Sampling against transformers' logits processors."""

import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from sinktrain.errors import StreamError
from sinktrain.streaming.sampling import check_sampling, sample


def random_logits(rows: int = 4, vocab: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 2


def drawn_tokens(logits: torch.Tensor, **settings: object) -> set[int]:
    """Everything that 4,000 draws from one row give."""
    generator = torch.Generator().manual_seed(1)
    return set(sample(logits.expand(4000, -1), generator=generator, **settings).tolist())


def kept_tokens(logits: torch.Tensor, warper: object) -> set[int]:
    return set(torch.isfinite(warper(None, logits[None].clone())[0]).nonzero()[:, 0].tolist())


def test_temperature_zero_takes_the_most_probable_token():
    logits = random_logits()
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_draws_exactly_what_transformers_keeps(top_k):
    for logits in random_logits():
        kept = kept_tokens(logits, TopKLogitsWarper(top_k))
        assert drawn_tokens(logits, top_k=top_k, temperature=3.0) == kept


def test_top_k_beyond_the_vocabulary_keeps_everything():
    logits = torch.zeros(8)
    assert drawn_tokens(logits, top_k=100) == set(range(8))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_draws_exactly_what_transformers_keeps(top_p):
    for logits in random_logits(vocab=12):
        assert drawn_tokens(logits, top_p=top_p) == kept_tokens(logits, TopPLogitsWarper(top_p))


def test_top_p_of_almost_nothing_keeps_the_most_probable_token_and_one_keeps_all():
    logits = random_logits()[0]
    assert drawn_tokens(logits, top_p=1e-9) == {int(logits.argmax())}
    assert drawn_tokens(torch.zeros(8), top_p=1.0) == set(range(8))


def test_temperature_is_applied_before_top_p_as_in_transformers():
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert drawn_tokens(logits, temperature=1.0, top_p=0.6) == {0}
    assert drawn_tokens(logits, temperature=4.0, top_p=0.6) == {0, 1}


def test_suppressed_ids_are_never_drawn():
    logits = torch.zeros(1, 6)
    logits[0, 2] = 50.0
    assert sample(logits, temperature=0, suppress=[2]).item() != 2
    assert drawn_tokens(logits[0], suppress=[2, 5]) == {0, 1, 3, 4}
    assert drawn_tokens(logits[0], suppress=[2, 5], top_k=2) <= {0, 1, 3, 4}
    assert drawn_tokens(logits[0], suppress=[2, 5], top_p=0.99) <= {0, 1, 3, 4}


def test_same_seed_draws_the_same_and_another_seed_differs():
    logits = torch.zeros(64, 50)
    first, again, other = (sample(logits, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_frequencies_are_the_softmax_at_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    tokens = sample(logits.expand(40_000, -1), temperature=0.7, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(frequencies, (logits / 0.7).softmax(-1), rtol=0, atol=0.01)


def test_bfloat16_logits_are_sampled_in_float32():
    logits = random_logits().bfloat16()
    first, second = (sample(x, generator=torch.Generator().manual_seed(0)) for x in (logits, logits.float()))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, None, None), "temperature is -0.1; use 0 (most probable token) or more"),
        ((float("nan"), None, None), "temperature is nan; use 0 (most probable token) or more"),
        ((1.0, 0, None), "top_k is 0; use 1 or more"),
        ((1.0, None, 0.0), "top_p is 0.0; use a probability above 0, at most 1"),
        ((1.0, None, 1.5), "top_p is 1.5; use a probability above 0, at most 1"),
    ],
)
def test_settings_that_cannot_be_sampled_with_get_one_clear_line(settings, message):
    with pytest.raises(StreamError) as raised:
        check_sampling(*settings)
    assert str(raised.value) == message
