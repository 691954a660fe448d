"""DeepSpeed's ZeRO: optimizer, gradients, weights in shards; checkpoints as one device writes them."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from sinktrain.data.datamodule import WindowData
from sinktrain.errors import ConfigError
from sinktrain.training.checkpoint_file import copy_on_host
from sinktrain.training.sharding import ShardingStrategy
from sinktrain.training.zero_step import ZeroStepper

if TYPE_CHECKING:
    from sinktrain.training.module import Pretraining

BUCKET_SIZE = 50_000_000
"""Elements that are exchanged at once; DeepSpeed holds a buffer of so many, whatever the model's size."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides the steps counted."""


class ZeroStrategy(ShardingStrategy, DeepSpeedStrategy):
    """ZeRO by DeepSpeed: every rank keeps 1/ranks of the optimizer, of gradients and of weights.

    Under ``bf16-mixed`` the network itself is bfloat16, and float32 master weights are in the shards;
    gradients are added up and exchanged in float32. Checkpoints are gathered parameter by parameter.

    Stage 3 is not compiled: it gathers the weights of each module in hooks, which break a graph.

    Args:
        stage: 1 shards the optimizer with its master weights, 2 the gradients too, 3 the weights too.
        timeout: how long a rank waits for the others before it fails.
    """

    stepper = ZeroStepper

    def __init__(self, stage: Literal[1, 2, 3] = 1, timeout: timedelta = timedelta(minutes=30)) -> None:
        sizes = {"reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE}
        config: dict[str, Any] = {"zero_optimization": {"stage": stage, **sizes}}
        self.stage = stage
        if find_spec("deepspeed") is None:  # ``check`` will say so: jsonargparse buries what is raised here
            DDPStrategy.__init__(self, timeout=timeout)
            self.config = config
            return
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says that it found no other
        super().__init__(config=config, timeout=timeout)
        self._engine: Any = None
        self._parameters: list[nn.Parameter] = []  # in the order of the parameter groups
        self._group_sizes: list[int] = []

    # -- set-up -----------------------------------------------------------------------------------

    def check(self, module: Pretraining) -> None:
        """Refuse what ZeRO or DeepSpeed cannot serve, before a run starts.

        Raises:
            ConfigError: DeepSpeed is not installed, has chosen another device, or should compile stage 3.
        """
        if find_spec("deepspeed") is None:
            raise ConfigError(
                "trainer.strategy ZeroStrategy needs the package deepspeed; "
                "pip install 'sinktrain[deepspeed]', or use --config fsdp"
            )
        import deepspeed

        check_device(self.root_device.type, deepspeed.get_accelerator().device_name())
        if self.zero_stage_3 and module.should_compile:
            raise ConfigError(
                "model.compile is true, but ZeRO stage 3 gathers weights in hooks that cannot be compiled; "
                "leave it out, or use stage 1 or 2"
            )

    def setup_environment(self) -> None:
        module = cast("Pretraining", self.lightning_module)
        self.check(module)
        if self.zero_stage_3:
            module.should_compile = False
        import deepspeed

        deepspeed.ops.__compatible_ops__ = {}  # nothing of it is needed that a compiler has to build
        warnings.filterwarnings(
            "ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning
        )
        DDPStrategy.setup_environment(self)  # Lightning's own knows DeepSpeed on CUDA only

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Every rank makes the whole model, as without ZeRO: so that all start from the same weights."""
        yield

    def setup(self, trainer: pl.Trainer) -> None:
        if self._engine is not None:  # trained before, in this process
            self._engine.module.to(self.root_device)
            self.model = self._engine
        elif trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
        else:
            DDPStrategy.setup(self, trainer)
            assert self.lightning_module is not None
            self.lightning_module.to(torch.bfloat16 if self._is_mixed else torch.float32)

    @property
    def _is_mixed(self) -> bool:
        return str(self.precision_plugin.precision) == "bf16-mixed"

    def _format_config(self) -> None:
        module = cast("Pretraining", self.lightning_module)
        data = cast(WindowData, cast(Any, module.trainer).datamodule)
        self.config = {
            **cast(dict[str, Any], self.config),
            "train_micro_batch_size_per_gpu": data.rows_at_once,
            "gradient_accumulation_steps": data.share(self.world_size) // data.rows_at_once,
            "gradient_clipping": module.clip_norm,
            "bf16": {"enabled": self._is_mixed, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "timers": {"throughput": {"enabled": False}},  # they wait for the device
            "steps_per_print": None,
        }

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any | None = None
    ) -> Any:
        """DeepSpeed's engine around the module, its master weights those of the module, not rounded."""
        import deepspeed

        assert isinstance(optimizer, AdamW), "parameters become flat shards, which AdamW alone can work on"
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self._parameters = [parameter for group in groups for parameter in group]
        self._group_sizes = [len(group) for group in groups]
        initial = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        with redirect_stdout(io.StringIO()):  # stage 1 prints the memory that it takes
            self._engine, wrapped, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=self._parameters,
                optimizer=optimizer,
                config=self.config,
                dist_init_required=False,
            )
        self._set_weights(initial)
        self._make_optimizer_state()
        return self._engine, wrapped

    # -- steps ------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, outside the engine: its stepper calls the engine for each micro-batch."""
        assert self.lightning_module is not None
        return self.lightning_module.training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """With plain tensors: weights that stage 3 gathers in inference mode would be useless in training."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return super().validation_step(*args, **kwargs)

    # -- checkpoints ------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        gathered = {}
        for name, parameter in self.lightning_module.named_parameters():
            whole = self._whole(parameter)
            if self.is_global_zero:
                gathered[name] = whole
        return gathered

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's state as one device has it: on rank 0, elsewhere without the tensors."""
        inner = self._engine.basic_optimizer
        step = next(iter(inner.state.values()))["step"].cpu()  # alike in all shards
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self._parameters):
            whole = {key: self._whole(parameter, key) for key in MOMENTS}
            if self.is_global_zero:
                state[number] = {"step": step.clone(), **whole}
        first, groups = 0, []
        for group, size in zip(inner.param_groups, self._group_sizes, strict=True):
            groups.append({**group, "params": list(range(first, first + size))})
            first += size
        return {"state": state, "param_groups": groups}

    def _whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """Float32 master weights of a parameter, or the optimizer's ``key`` for it; every rank must ask."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = (
            safe_get_full_fp32_param(parameter)
            if key is None
            else safe_get_full_optimizer_state(parameter, key)
        )
        return copy_on_host(cast(Tensor, whole)) if self.is_global_zero else whole

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        if self._engine is None:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            self._set_weights(checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (saved,) = checkpoint["optimizer_states"]
        if not saved["state"]:
            return
        for shard_state in self._engine.basic_optimizer.state.values():
            shard_state["step"].copy_(saved["state"][0]["step"])
        for number, parameter in enumerate(self._parameters):
            for key in MOMENTS:
                self._set(parameter, saved["state"][number][key], key)

    def _make_optimizer_state(self) -> None:
        """What AdamW makes at its first step, where DeepSpeed 0.19.8 links it for the first group only."""
        inner, wrapper = self._engine.basic_optimizer, self._engine.optimizer
        shards = (
            wrapper.fp32_partitioned_groups_flat
            if self.zero_stage_3
            else [shard for group in inner.param_groups for shard in group["params"]]
        )
        for shard in shards:
            step = torch.zeros((), dtype=torch.float32, device=shard.device)
            inner.state[shard] = {"step": step, **{key: torch.zeros_like(shard) for key in MOMENTS}}
        if not self.zero_stage_3:
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set_weights(self, whole: Mapping[str, Tensor]) -> None:
        """Set master weights, and those that the network computes with, from whole float32 tensors."""
        import deepspeed

        assert self.lightning_module is not None
        for name, parameter in self.lightning_module.named_parameters():
            self._set(parameter, whole[name])
            if self.zero_stage_3:
                with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.is_global_zero:
                        parameter.copy_(whole[name])
        if not self.zero_stage_3:
            self._engine.optimizer.update_lp_params()

    def _set(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Let this rank take its shard of a parameter's master weights, or of the optimizer's ``key``."""
        from deepspeed import utils

        value: Any = whole
        if self.zero_stage_3:  # whose own set_full fails where the ranks do not divide a parameter
            value = share(whole, cast(Any, parameter).ds_tensor.numel(), self.global_rank)
        if key is None:
            set_weights = (
                utils.safe_set_local_fp32_param if self.zero_stage_3 else utils.safe_set_full_fp32_param
            )
            set_weights(parameter, value)
        else:
            set_state = (
                utils.safe_set_local_optimizer_state
                if self.zero_stage_3
                else utils.safe_set_full_optimizer_state
            )
            set_state(parameter, value, key)


def share(whole: Tensor, size: int, rank: int) -> Tensor:
    """A rank's elements of a tensor that is cut into shards of one size, the last filled up with zeros."""
    mine = whole.flatten()[rank * size : (rank + 1) * size]
    return F.pad(mine, (0, size - len(mine)))


def check_device(ours: str, deepspeeds: str) -> None:
    """Refuse a device that DeepSpeed has not chosen: it takes CUDA where there is some, unless told.

    Args:
        ours: type of the Trainer's devices.
        deepspeeds: type of those that DeepSpeed works on.
    """
    if ours != deepspeeds:
        raise ConfigError(
            f"trainer.accelerator is {ours}, but DeepSpeed has chosen {deepspeeds} here; "
            f"use --trainer.accelerator {deepspeeds}, or set DS_ACCELERATOR={ours} in the environment"
        )
