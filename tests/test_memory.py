"""What a run takes of a device's memory is estimated from its settings; measured where that can be done."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import PYTHIA, ModelConfig, NetworkConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.fsdp import FSDP2Strategy
from sinktrain.training.memory import (
    STATE_BYTES,
    Memory,
    checkpoint_bytes,
    estimate_memory,
    num_parameters,
)
from sinktrain.training.step import fast_attention

SMALL = ModelConfig(NetworkConfig(64, 3, 4, vocab_size=100, max_position_embeddings=128))


@pytest.mark.parametrize("recomputes", [False, True])
def test_activations_are_those_that_autograd_keeps(recomputes: bool) -> None:
    model = GPTNeoX(SMALL)
    model.recomputes_activations = recomputes
    tokens = torch.zeros(2, 128, dtype=torch.int64)
    not_layers = [*model.parameters(), model.embed_out.weight]
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in not_layers}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    estimate = estimate_memory(SMALL, 2, 128, recomputes=recomputes)
    layer = estimate_memory(SMALL, 2, 128).activations / 3
    expected = estimate.activations - (layer if recomputes else 0)  # recomputed in the backward pass only
    final = 2 * 128 * (2 * 64 + 100) * 4  # the last norm's input and output, and the log-softmax
    assert sum(kept.values()) - final == pytest.approx(expected, rel=0.1)


def test_state_is_16_bytes_a_parameter_and_shards_are_a_devices_part() -> None:
    def memory(**options: object) -> Memory:
        return estimate_memory(ModelConfig(PYTHIA["pythia-160m"]), 4, 2048, is_mixed=True, **options)  # type: ignore[arg-type]

    alone = memory()
    assert alone.state == 16 * 162_322_944
    view, copy = DDPStrategy(gradient_as_bucket_view=True), DDPStrategy()
    assert memory(strategy=view, world_size=4) == alone
    assert memory(strategy=copy, world_size=4).state == 20 * 162_322_944
    assert memory(strategy=FSDP2Strategy(), world_size=4).state == alone.state / 4
    assert memory(strategy=FSDP2Strategy(), world_size=4).activations == alone.activations
    matrices = 12 * 12 * 768**2
    assert memory(is_muon=True).state == alone.state - 4 * matrices
    assert memory(recomputes=True).activations < alone.activations / 5
    assert memory(is_fused=True).logits == 4 * 2048 * 50304 * 2
    assert memory().logits == 4 * 2048 * 50304 * 10


def test_a_checkpoint_holds_the_state_but_the_gradients() -> None:
    model = empty_model(ModelConfig(PYTHIA["pythia-160m"]))
    assert checkpoint_bytes(model) == 12 * 162_322_944
    assert checkpoint_bytes(model, is_muon=True) == checkpoint_bytes(model) - 4 * 12 * 12 * 768**2
    assert num_parameters(model) * STATE_BYTES == 16 * 162_322_944


@pytest.mark.slow  # deepspeed takes seconds to import
@pytest.mark.parametrize(("stage", "part"), [(1, (4 + 4 + 2) / 16), (2, (4 + 1 + 2) / 16), (3, 1 / 4)])
def test_each_zero_stage_shards_more(stage: int, part: float) -> None:
    pytest.importorskip("deepspeed")
    from sinktrain.training.zero import ZeroStrategy

    sharded = estimate_memory(SMALL, 1, 128, strategy=ZeroStrategy(stage=stage), world_size=4)
    assert sharded.state == part * estimate_memory(SMALL, 1, 128).state


@pytest.mark.gpu
def test_estimated_memory_is_near_the_peak_on_a_gpu() -> None:
    config = ModelConfig(PYTHIA["pythia-70m"])
    model = GPTNeoX(config).cuda()
    model.compile(dynamic=False)
    tokens = torch.zeros(16, 2048, dtype=torch.int64, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with fast_attention(), torch.autocast("cuda", torch.bfloat16):
            model(tokens, tokens).backward()
    estimate = estimate_memory(config, 16, 2048, is_mixed=True, is_fused=True)
    without_moments = estimate.total - estimate.state / 2
    assert torch.cuda.max_memory_allocated() == pytest.approx(without_moments, rel=0.35)
