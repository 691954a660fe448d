"""Bytes of a run: what its state takes in a checkpoint, and what a device holds while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.strategies import DDPStrategy, Strategy

from sinktrain.model.checkpoints import empty_model
from sinktrain.model.config import ModelConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.muon import muon_groups
from sinktrain.training.sharding import is_sharded

GIB = 2**30

WEIGHT_BYTES, GRADIENT_BYTES = 4, 4
MOMENT_BYTES = 4
"""Float32: AdamW keeps two moments of a parameter, Muon one."""

STATE_BYTES = WEIGHT_BYTES + GRADIENT_BYTES + 2 * MOMENT_BYTES
"""Of a parameter while AdamW trains it; a checkpoint, which has no gradients, surely takes less."""

KEPT_WIDTHS, FUSED_KEPT_WIDTHS = 9, 7
"""Activations of a layer that its backward pass reads, each ``hidden_size`` wide: the residual stream,
two normalised copies, query, key and value, rotated query and key (in place where attention is fused with
its projection), what attention mixed."""

KEPT_MLP_WIDTHS, FUSED_KEPT_MLP_WIDTHS = 2, 1
"""The same, each ``intermediate_size`` wide: before and, where it is not computed again, after the
activation function."""

FUSED_LOGITS_BYTES = GIB
"""Most logits that the fused loss holds (``sinktrain.model.fused.LOGITS_BYTES``; that needs Triton)."""


def num_parameters(model: GPTNeoX) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_bytes(model: GPTNeoX, is_muon: bool = False) -> int:
    """What a checkpoint takes: the weights and the optimizer's moments, 12 bytes a parameter under AdamW."""
    return WEIGHT_BYTES * num_parameters(model) + _moments_bytes(model, is_muon)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of a device while it trains."""

    state: float
    """Weights, gradients and the optimizer's moments, or the device's shard of them."""
    casts: float
    """Weights in the precision of the matrix products, or gathered from the other devices."""
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.state + self.casts + self.activations + self.logits


def estimate_memory(
    config: ModelConfig,
    rows: int,
    seq_len: int,
    *,
    is_mixed: bool = False,
    is_fused: bool = False,
    recomputes: bool = False,
    is_muon: bool = False,
    strategy: Strategy | None = None,
    world_size: int = 1,
) -> Memory:
    """What a device holds at the end of a micro-batch's forward pass, when it holds the most.

    State is 16 bytes a parameter (12 to 16 under Muon), of which strategies that shard leave each device
    its part. Activations are those that autograd keeps, ``KEPT_WIDTHS`` and ``KEPT_MLP_WIDTHS``, and the
    float32 log-sum-exp of each head; with ``recomputes`` the residual stream of every layer and all of one
    layer. The same formula gives 16.1 GiB for 160m at micro-batch 32 on an H100, where 16.6 were measured.

    Args:
        config: model, sink included.
        rows: samples of a micro-batch.
        is_mixed: matrix products in bf16; otherwise everything is float32.
        is_fused: layers and loss as CUDA has them; otherwise all logits, their float32 log-softmax and
            its gradient are held.
        strategy: of the run; None for one device.
    """
    network, empty = config.network, empty_model(config)
    element = 2 if is_mixed else 4
    parameters = num_parameters(empty)
    stage = sharded_stage(strategy)
    own = [1 / world_size if stage >= needed else 1.0 for needed in (3, 2, 1)]
    state = (
        WEIGHT_BYTES * parameters * own[0]
        + GRADIENT_BYTES * parameters * (own[1] + _copies_gradients(strategy))
        + _moments_bytes(empty, is_muon) * own[2]
    )
    assert network.intermediate_size is not None
    tokens = rows * seq_len
    residual = tokens * network.hidden_size * element
    widths, mlp_widths = KEPT_WIDTHS, KEPT_MLP_WIDTHS
    if is_fused:
        widths, mlp_widths = FUSED_KEPT_WIDTHS, FUSED_KEPT_MLP_WIDTHS
    kept = widths * network.hidden_size + mlp_widths * network.intermediate_size
    layer = tokens * (kept * element + 4 * network.num_attention_heads)
    layers = network.num_hidden_layers
    all_logits = tokens * config.vocab_size
    return Memory(
        state=state,
        casts=parameters * element if is_mixed or stage == 3 else 0,
        activations=layers * residual + layer if recomputes else layers * layer,
        logits=min(all_logits * element, FUSED_LOGITS_BYTES) if is_fused else all_logits * (element % 4 + 8),
    )


def _moments_bytes(model: GPTNeoX, is_muon: bool) -> int:
    if not is_muon:
        return 2 * MOMENT_BYTES * num_parameters(model)
    return sum(
        (1 if "momentum" in group else 2) * MOMENT_BYTES * parameter.numel()
        for group in muon_groups(model, weight_decay=0.0)
        for parameter in group["params"]
    )


def sharded_stage(strategy: Strategy | None) -> int:
    """What is in shards, as ZeRO counts: 1 the optimizer, 2 gradients too, 3 weights too; 0 nothing."""
    return strategy.stage if is_sharded(strategy) else 0


def _copies_gradients(strategy: Strategy | None) -> bool:
    """Whether DDP's buckets hold the gradients a second time."""
    if not isinstance(strategy, DDPStrategy) or is_sharded(strategy):
        return False
    return not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
