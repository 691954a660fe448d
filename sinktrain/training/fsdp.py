"""FSDP2: weights, gradients and optimizer in shards on all devices, checkpoints as one device writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sinktrain.model.neox import GPTNeoX
from sinktrain.training.checkpoint_file import copy_on_host
from sinktrain.training.sharding import ShardingStrategy
from sinktrain.training.step import Stepper, sum_over_ranks


class ShardedStepper(Stepper):
    """Each rank clips and applies its shard of the gradient; norm and skipping are those of the whole.

    Gradients are exchanged after the last micro-batch, until which each rank adds up whole ones. The
    optimizer's flags stay plain scalars: torch takes those as replicated among sharded tensors.
    """

    @contextmanager
    def no_gradient_sync(self) -> Iterator[None]:
        network = cast(FSDPModule, self.module.require_network)
        network.set_requires_gradient_sync(False)
        network.set_reshard_after_backward(self.strategy.reshard_after_forward)
        yield
        network.set_requires_gradient_sync(True)
        network.set_reshard_after_backward(True)

    def norm(self) -> Tensor:
        gradients = [cast(DTensor, p.grad).to_local() for p in self.module.parameters() if p.grad is not None]
        return sum_over_ranks(get_total_norm(gradients, foreach=True).square()).sqrt()


class FSDP2Strategy(ShardingStrategy, ModelParallelStrategy):
    """Every rank keeps 1/ranks of weights, gradients and optimizer, and gathers a layer when it computes it.

    Args:
        reshard_after_forward: drop a layer's gathered weights after its forward pass and gather them
            again for its backward pass (as ZeRO-3); kept until then, and over micro-batches, when false.
        timeout: how long a rank waits for the others before it fails.
    """

    stepper = ShardedStepper
    stage = 3
    gathers_layers = True

    def __init__(
        self, reshard_after_forward: bool = True, timeout: timedelta = timedelta(minutes=30)
    ) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, network: GPTNeoX) -> None:
        """Leave each rank its rows of every parameter, in place; layers are gathered one by one."""
        is_mixed = self.precision_plugin.precision == "bf16-mixed"
        settings: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if is_mixed else None, torch.float32),
        }
        for layer in network.gpt_neox.layers:
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **settings)
        fully_shard(network, reshard_after_forward=False, **settings)  # its backward pass begins at once

    # -- checkpoints ------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._gather(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        gathered = {number: self._gather(tensors) for number, tensors in state["state"].items()}
        return {**state, "state": gathered}

    def _gather(self, tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """Whole tensors, one after the other, on the CPU of rank 0; every rank must ask for the same."""
        gathered = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_global_zero:
                gathered[name] = copy_on_host(whole)
        return gathered

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        sharded = {
            name: _shard(whole, own[name]) if name in own else whole
            for name, whole in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(sharded, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                number: {name: _shard(whole, parameters[number]) for name, whole in tensors.items()}
                for number, tensors in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of this rank's rows of a whole tensor, on the device; of a scalar, all there is.

    Args:
        whole: the tensor of all ranks, on the CPU.
        like: a sharded tensor of the same rows.
    """
    if not isinstance(like, DTensor) or whole.dim() == 0:
        return whole.to(like.device, copy=True)
    mesh, rank = like.device_mesh, like.device_mesh.get_local_rank()
    parts = whole.chunk(mesh.size())
    part = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(
        part.to(like.device, copy=True),
        mesh,
        like.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
