"""Pythia's initialisation, parameter by parameter, and the sizes of its seven models."""

import dataclasses

import pytest
import torch
from oracles import TINY

from sinktrain.model.config import PYTHIA, ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.init import initialize, small_init_std, wang_init_std
from sinktrain.model.neox import GPTNeoX

# preset: small std, wang std, parameters in all and without both embeddings (millions); computed from
# Pythia's recipes, not with the code under test.
TABLE = {
    "pythia-14m": (0.0559, 0.0295, 14.1, 1.2),
    "pythia-31m": (0.0395, 0.0208, 30.5, 4.7),
    "pythia-70m": (0.0280, 0.0147, 70.4, 18.9),
    "pythia-160m": (0.0228, 0.00601, 162.3, 85.1),
    "pythia-410m": (0.0198, 0.00260, 405.3, 302.3),
    "pythia-1b": (0.0140, 0.00276, 1011.8, 805.7),
    "pythia-1.4b": (0.0140, 0.00184, 1414.6, 1208.6),
}


def initialized(config: ModelConfig, seed: int = 0) -> GPTNeoX:
    model = GPTNeoX(config)
    initialize(model, seed)
    return model


def test_the_table_names_every_preset():
    assert list(TABLE) == list(PYTHIA)


@pytest.mark.parametrize("name", TABLE)
def test_preset_standard_deviations_are_pythias(name):
    small, wang, _, _ = TABLE[name]
    assert small_init_std(PYTHIA[name]) == pytest.approx(small, rel=5e-3)
    assert wang_init_std(PYTHIA[name]) == pytest.approx(wang, rel=5e-3)


@pytest.mark.parametrize("name", TABLE)
def test_preset_parameter_counts_are_pythias(name):
    with torch.device("meta"):
        model = GPTNeoX(ModelConfig(PYTHIA[name]))
    total = sum(p.numel() for p in model.parameters())
    embeddings = model.gpt_neox.embed_in.weight.numel() + model.embed_out.weight.numel()
    assert total / 1e6 == pytest.approx(TABLE[name][2], abs=0.051)
    assert (total - embeddings) / 1e6 == pytest.approx(TABLE[name][3], abs=0.051)


def test_presets_share_pythias_constants():
    for config in PYTHIA.values():
        assert config.rotary_pct == 0.25
        assert config.vocab_size == 50304
        assert config.max_position_embeddings == 2048
        assert config.intermediate_size == 4 * config.hidden_size
        assert config.hidden_act == "gelu"
        assert config.use_parallel_residual
        assert config.attention_bias
    heads = [32, 32, 64, 64, 64, 256, 128]
    assert [config.head_dim for config in PYTHIA.values()] == heads


def test_every_kind_of_parameter_has_its_standard_deviation():
    config = NetworkConfig(128, 3, 4, vocab_size=512)
    model = initialized(ModelConfig(config))
    small, wang = (2 / (5 * 128)) ** 0.5, 2 / (3 * 128**0.5)
    expected = {
        "embed_in.weight": small,
        "embed_out.weight": small,
        "query_key_value.weight": small,
        "dense_h_to_4h.weight": small,
        "attention.dense.weight": wang,
        "dense_4h_to_h.weight": wang,
    }
    seen = set()
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.dim() == 1:
            fill = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, fill)), name
            continue
        kind = next(kind for kind in expected if name.endswith(kind))
        seen.add(kind)
        # 16,384 draws or more: the sampled deviation is within 0.6% with a probability of 2 in 3
        assert float(parameter.std()) == pytest.approx(expected[kind], rel=0.025), name
        assert abs(float(parameter.mean())) < expected[kind] * 0.04, name
    assert seen == set(expected)


def test_same_seed_gives_the_same_values_and_another_seed_others():
    first, again, other = (initialized(ModelConfig(TINY), seed) for seed in (3, 3, 4))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.embed_out.weight, other.embed_out.weight)


def test_arms_begin_with_the_same_parameters():
    vanilla = initialized(ModelConfig(TINY))
    sink = initialized(ModelConfig(TINY, SinkConfig("token", 2, (95, 96))))
    assert list(vanilla.state_dict()) == list(sink.state_dict())
    for name, value in vanilla.state_dict().items():
        assert torch.equal(value, sink.state_dict()[name]), name


def test_values_do_not_depend_on_the_model_dtype_or_the_default_dtype():
    reference = initialized(ModelConfig(TINY))
    half = GPTNeoX(ModelConfig(TINY)).bfloat16()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        initialize(half, 0)
    finally:
        torch.set_default_dtype(default)
    for name, value in reference.state_dict().items():
        assert torch.equal(value.bfloat16(), half.state_dict()[name]), name


def test_a_serial_network_without_attention_biases_is_initialised_too():
    config = dataclasses.replace(TINY, use_parallel_residual=False, attention_bias=False)
    model = initialized(ModelConfig(config))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(name.endswith("attention.dense.bias") for name, _ in model.named_parameters())
