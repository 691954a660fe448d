"""The network against transformers and against plain loops; its config's messages; its loss."""

import dataclasses

import pytest
import torch
from oracles import TINY, VOCAB, dense_forward, random_tokens, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gpt_neox import modeling_gpt_neox

from sinktrain.errors import ConfigError
from sinktrain.model.config import ACTIVATIONS, PYTHIA, ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.loss import IGNORED, token_losses
from sinktrain.model.neox import MLP, GPTNeoX

GRID = [
    {"rotary_pct": rotary_pct, "use_parallel_residual": parallel, "attention_bias": bias}
    for rotary_pct in (0.0, 0.25, 1.0)
    for parallel in (True, False)
    for bias in (True, False)
] + [{"hidden_size": 2 * head_dim} for head_dim in (32, 64, 128, 256)]


def as_transformers(model: GPTNeoX) -> GPTNeoXForCausalLM:
    """The same weights in transformers' class; strict, so every name and shape must agree."""
    sizes = dataclasses.asdict(model.config.network)
    rotary = {
        "rope_type": "default",
        "rope_theta": sizes.pop("rotary_emb_base"),
        "partial_rotary_factor": sizes.pop("rotary_pct"),
    }
    config = GPTNeoXConfig(**sizes, rope_parameters=rotary, attn_implementation="eager")
    other = GPTNeoXForCausalLM(config).to(model.dtype)
    has_new_name = "lm_head.weight" in other.state_dict()
    state = {
        name.replace("embed_out", "lm_head") if has_new_name else name: value
        for name, value in model.state_dict().items()
    }
    other.load_state_dict(state, strict=True)
    return other.eval()


@pytest.fixture
def _float64_transformers(monkeypatch):
    """Angles and softmax, which transformers fixes to float32, in the dtype of the activations."""

    def angles(self, x, position_ids):
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        dim = int(head_dim * config.rope_parameters["partial_rotary_factor"])
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        freqs = position_ids[..., None].double() * config.rope_parameters["rope_theta"] ** -exponents
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos(), emb.sin()

    softmax = F.softmax
    monkeypatch.setattr(modeling_gpt_neox.GPTNeoXRotaryEmbedding, "forward", angles)
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


@pytest.mark.usefixtures("_float64_transformers")
@pytest.mark.parametrize("sizes", GRID, ids=str)
def test_logits_equal_transformers_in_float64(sizes):
    model = tiny_model(**sizes)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        expected = as_transformers(model)(tokens).logits
    assert model(tokens).dtype == torch.float64
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [*GRID[::5], GRID[-1]], ids=str)
def test_logits_equal_transformers_in_float32(sizes):
    model = tiny_model(dtype=torch.float32, **sizes)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        expected = as_transformers(model)(tokens).logits
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=2e-5 * float(expected.std()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers(activation):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    ours = MLP(dataclasses.replace(TINY, hidden_act=activation)).activation
    torch.testing.assert_close(ours(x), ACT2FN[activation](x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "sizes", [*({"rotary_pct": pct} for pct in (0.0, 0.25, 1.0)), {"use_parallel_residual": False}], ids=str
)
def test_dense_forward_equals_plain_loops(sizes):
    model = tiny_model(**sizes)
    tokens = random_tokens(2, 25)
    torch.testing.assert_close(model(tokens), dense_forward(model, tokens), rtol=0, atol=1e-12)


def test_no_rotation_means_that_the_order_of_earlier_tokens_does_not_matter_to_one_layer():
    """The proof of rotary_pct 0 that owes nothing to transformers."""
    tokens = random_tokens(1, 20)
    shuffled = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    without, with_rotary = (tiny_model(rotary_pct=pct, num_hidden_layers=1) for pct in (0.0, 0.25))
    torch.testing.assert_close(without(tokens)[:, -1], without(shuffled)[:, -1], rtol=0, atol=1e-12)
    assert (with_rotary(tokens)[:, -1] - with_rotary(shuffled)[:, -1]).abs().max() > 1e-3


def test_tokens_are_taken_as_given_and_no_sink_is_added():
    tokens = random_tokens(2, 9)
    plain, sunk = tiny_model(), tiny_model(sinks=(95, 96))
    assert torch.equal(plain(tokens), sunk(tokens))
    assert plain.sink_ids == []
    assert sunk.sink_ids == [95, 96]


def test_later_tokens_do_not_change_earlier_logits():
    model, tokens = tiny_model(), random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % VOCAB
    torch.testing.assert_close(model(changed)[:, :12], model(tokens)[:, :12], rtol=0, atol=1e-13)
    assert not torch.allclose(model(changed)[:, 12:], model(tokens)[:, 12:])


def test_bfloat16_autocast_gives_bfloat16_logits_near_float32():
    model, tokens = tiny_model(dtype=torch.float32), random_tokens(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(tokens)).abs().max() < 0.1 * model(tokens).abs().max()


def test_gradients_reach_every_parameter():
    model = tiny_model(dtype=torch.float32).requires_grad_(True)
    token_losses(model(random_tokens(1, 9)), random_tokens(1, 9, seed=1)).sum().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert lacking == []


def test_token_losses_are_cross_entropies_and_zero_where_ignored():
    logits = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = random_tokens(2, 5)
    targets[1, 3] = IGNORED
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float64
    assert losses[1, 3] == 0
    chosen = logits.log_softmax(-1)[0].gather(-1, targets[0, :, None])[:, 0]
    torch.testing.assert_close(losses[0], -chosen, rtol=0, atol=1e-13)


def test_token_losses_of_bfloat16_logits_are_taken_in_float32():
    logits = torch.randn(1, 5, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = random_tokens(1, 5)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, token_losses(logits.float(), targets))


def test_config_survives_its_dictionary():
    config = ModelConfig(TINY, SinkConfig("token", 2, (95, 96)))
    assert ModelConfig.from_dict(config.to_dict()) == config
    vanilla = ModelConfig(PYTHIA["pythia-14m"])
    assert ModelConfig.from_dict(vanilla.to_dict()) == vanilla


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SinkConfig("zeor"),
            'model.sink.kind "zeor" is not one of gate, k_bias, kv_bias, logit, none, token, zero; '
            'did you mean "zero"?',
        ),
        (lambda: SinkConfig("token", 9), "model.sink.count is 9; use 1 to 8"),
        (
            lambda: SinkConfig("token", 2, (95,)),
            "model.sink.token_ids has 1 ids for a count of 2; give one for each",
        ),
        (
            lambda: NetworkConfig(num_hidden_layers=0),
            "a network of hidden_size 768, num_hidden_layers 0 and num_attention_heads 12 is empty; "
            "use 1 or more of each",
        ),
        (
            lambda: NetworkConfig(hidden_size=100),
            "hidden_size 100 does not divide into 12 heads; change num_attention_heads or hidden_size",
        ),
        (
            lambda: NetworkConfig(rotary_pct=0.33),
            "rotary_pct 0.33 rotates 21 of 64 dimensions; use a share from 0 to 1 that gives an even number",
        ),
        (
            lambda: NetworkConfig(rotary_pct=1.5),
            "rotary_pct 1.5 rotates 96 of 64 dimensions; use a share from 0 to 1 that gives an even number",
        ),
        (
            lambda: NetworkConfig(hidden_act="gelu_fats"),
            'hidden_act "gelu_fats" is not one of gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, silu; '
            'did you mean "gelu_fast"?',
        ),
        (
            lambda: ModelConfig(TINY, SinkConfig("token", 1)),
            "a model with sink tokens needs their ids: model.sink.token_ids",
        ),
        (
            lambda: ModelConfig(TINY, SinkConfig("token", 1, (97,))),
            "sink token id 97 is outside the vocabulary of 97 rows",
        ),
        (
            lambda: ModelConfig(NetworkConfig()).vocab_size,
            "model.network.vocab_size is not set; train on shards, or set it",
        ),
    ],
)
def test_config_mistakes_get_one_clear_line(make, message):
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == message


def test_a_vanilla_sink_has_no_count_and_no_ids():
    assert SinkConfig("none", 3, (1, 2, 3)) == SinkConfig()
    assert SinkConfig().to_dict() == {"kind": "none", "count": 0, "token_ids": []}


def test_module_is_an_ordinary_one():
    assert isinstance(tiny_model(), nn.Module)
    assert tiny_model().device.type == "cpu"
    assert tiny_model(dtype=torch.bfloat16).dtype == torch.bfloat16
