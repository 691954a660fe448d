"""The training step: one optimizer step a batch, gradients accumulated over micro-batches inside it.

Lightning's batch is a rank's whole share of a global batch. So what Lightning does per batch (hooks,
a broadcast in a distributed run) happens once a step, batches and optimizer steps are counted alike,
and a run continues on another number of devices or with other micro-batches without a remainder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from sinktrain import __version__
from sinktrain.data.datamodule import WindowData
from sinktrain.data.windows import IGNORED, insert_sinks, shared_targets
from sinktrain.errors import ConfigError
from sinktrain.model.checkpoints import CHECKPOINT_KEY, FORMAT_VERSION, load_model
from sinktrain.model.config import ModelConfig, NetworkConfig, SinkConfig
from sinktrain.model.init import continue_from, initialize
from sinktrain.model.masked_attention import Mask
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.graphed import GraphedStepper
from sinktrain.training.muon import muon, muon_groups
from sinktrain.training.optim import adamw, parameter_groups
from sinktrain.training.random_states import random_states, restore_random_states
from sinktrain.training.recipe import arm_name, check_recipe, check_skipping
from sinktrain.training.schedule import Schedule
from sinktrain.training.sharding import is_sharded
from sinktrain.training.step import Stepper, fast_attention

GRAPHED_PARAMETERS = 100_000_000


class Pretraining(pl.LightningModule):
    """A GPT-NeoX model and how it is trained; Pythia's recipe by default.

    Args:
        network: sizes of the network.
        sink: what the model is trained to lean on; ``none`` is vanilla.
        optimizer: ``adamw``, or ``muon`` for the matrices of the layers and AdamW for the rest, with the
            same learning rate and weight decay.
        learning_rate: peak, after warm-up.
        schedule: ``cosine`` or ``wsd`` (warm-up, stable, decay).
        warmup_steps: linear warm-up; 1% of ``trainer.max_steps`` when null.
        decay_steps: length of the decay of ``wsd``; 20% of ``trainer.max_steps`` when null.
        min_lr_ratio: share of the peak that the decay ends at.
        weight_decay: on everything but LayerNorm parameters and biases.
        betas: AdamW's.
        eps: AdamW's.
        clip_norm: largest norm of the gradient.
        spike_sigma: a step is skipped whose loss is so many standard deviations above the mean of the
            last 128; when null only one whose loss or gradient is not finite.
        max_skipped_steps: steps skipped in a row after which training stops.
        compile: compile the network in place; on CUDA only when null.
        recompute_activations: keep no activations inside layers, but compute them again in the backward
            pass: a third more work in a fraction of the memory.
        cuda_graph: replay a step as one CUDA graph, on one CUDA device; when null, for models of up to
            100m parameters, which otherwise wait for launches.
        window: how many tokens, the newest, a token sees in training besides the sinks, as in a stream under
            the layout sinks + window; when null all. ``val/loss`` is under the same mask. The mask makes an
            arm of its own, and costs the fastest kernels.
        mask_documents: let a token see the tokens of its own document and the sinks alone; each document then
            has them right in front of it, as if it began with its own.
        init_from: a MODEL whose weights training starts from, instead of Pythia's initialisation. Sinks that
            it was not trained with get freshly drawn embeddings, in rows that its vocabulary already has.
        arm: what the run is called among its siblings; by its sink and mask when null.
        seed: of the initialisation; ``seed_everything``.
    """

    network: GPTNeoX | None
    sink_ids: Tensor

    def __init__(
        self,
        network: NetworkConfig,  # no default instances here: their derived fields would become settings
        sink: SinkConfig,
        optimizer: Literal["adamw", "muon"] = "adamw",
        learning_rate: float = 6e-4,
        schedule: Literal["cosine", "wsd"] = "cosine",
        warmup_steps: int | None = None,
        decay_steps: int | None = None,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip_norm: float = 1.0,
        spike_sigma: float | None = 6.0,
        max_skipped_steps: int = 16,
        compile: bool | None = None,
        recompute_activations: bool = False,
        cuda_graph: bool | None = None,
        window: int | None = None,
        mask_documents: bool = False,
        init_from: str | None = None,
        arm: str | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ConfigError(f"model.window is {window}; use 1 or more, or null for all earlier tokens")
        check_recipe(learning_rate, min_lr_ratio, weight_decay, betas, eps, clip_norm)
        check_skipping(spike_sigma, max_skipped_steps)
        self.automatic_optimization = False
        self.network_config = network
        self.sink = sink
        self.optimizer_kind = optimizer
        self.learning_rate = learning_rate
        self.schedule_kind = schedule
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.min_lr_ratio = min_lr_ratio
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.clip_norm = clip_norm
        self.spike_sigma = spike_sigma
        self.max_skipped_steps = max_skipped_steps
        self.should_compile = compile
        self.recompute_activations = recompute_activations
        self.cuda_graph = cuda_graph
        self.window = window
        self.mask_documents = mask_documents
        self.init_from = init_from
        self.given_arm = arm
        self.seed = seed
        self.network = None
        self._stepper: Stepper | None = None
        self._resumed: dict[str, Any] = {}

    # -- the model --------------------------------------------------------------------------------

    def model_config(self, data: WindowData) -> ModelConfig:
        """What is trained on this data; shards give the sizes and sink ids that the settings leave open."""
        if self.source is not None:
            return self._continued_config(self.source.config, data)
        manifest = data.manifest
        vocab_size = self.network_config.vocab_size or manifest.padded_vocab_size
        if vocab_size < manifest.padded_vocab_size:
            raise ConfigError(
                f"model.network.vocab_size is {vocab_size} but the shards need "
                f"{manifest.padded_vocab_size} rows; leave it out to take the shards'"
            )
        token_ids = self.sink.token_ids or manifest.sink_token_ids[: self.sink.count]
        return self._config_on(data, replace(self.network_config, vocab_size=vocab_size), token_ids)

    def _continued_config(self, source: ModelConfig, data: WindowData) -> ModelConfig:
        """The network of ``init_from``; its own sinks come first, those of the shards next."""
        manifest = data.manifest
        if source.vocab_size < manifest.vocab_size:
            raise ConfigError(
                f"--model.init_from {self.init_from} has {source.vocab_size} vocabulary rows and the shards "
                f"have {manifest.vocab_size} token ids; prepare the text with the model's own tokenizer "
                "(sinktrain prepare TEXT --tokenizer …)"
            )
        own = source.sink.token_ids
        others = tuple(i for i in manifest.sink_token_ids if i not in own)
        token_ids = self.sink.token_ids or (own + others)[: self.sink.count]
        outside = [i for i in token_ids if i >= source.vocab_size]
        if outside:
            raise ConfigError(
                f"--model.init_from {self.init_from} has {source.vocab_size} vocabulary rows and none for "
                f"sink token {outside[0]}; name rows that the text never uses with --model.sink.token_ids"
            )
        return self._config_on(data, source.network, token_ids)

    def _config_on(self, data: WindowData, network: NetworkConfig, token_ids: tuple[int, ...]) -> ModelConfig:
        sink = SinkConfig(self.sink.kind, self.sink.count, token_ids)
        return ModelConfig(replace(network, max_position_embeddings=data.seq_len), sink)

    @cached_property
    def source(self) -> GPTNeoX | None:
        """The model of ``init_from``, read once."""
        return load_model(self.init_from) if self.init_from else None

    def configure_model(self) -> None:
        if self.network is not None:
            return
        self.network = GPTNeoX(self.model_config(self._data))
        if self.source is None:
            initialize(self.network, self.seed)
        else:
            continue_from(self.network, self.source, self.seed)
            self.source.to("meta")  # its weights have been taken
        self.network.recomputes_activations = self.recompute_activations
        if self.window is not None or self.mask_documents:
            document_end = self._data.manifest.eos_token_id if self.mask_documents else None
            self.network.mask = Mask(self.window, document_end)
        self.register_buffer(
            "sink_ids", torch.tensor(self.network.sink_ids, dtype=torch.int64), persistent=False
        )
        strategy = self.trainer.strategy
        if is_sharded(strategy):
            strategy.shard(self.network)
        use_cuda = strategy.root_device.type == "cuda"
        self.is_compiled = use_cuda if self.should_compile is None else self.should_compile
        if self.is_compiled:
            # Layer by layer where they are gathered one by one: a graph would break at each of them.
            is_in_parts = is_sharded(strategy) and strategy.gathers_layers
            for part in self.network.gpt_neox.layers if is_in_parts else [self.network]:
                part.compile(dynamic=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        make = muon if self.optimizer_kind == "muon" else adamw
        return make(self.require_network, self.learning_rate, self.weight_decay, self.betas, self.eps)

    def check_strategy(self) -> None:
        """Refuse a strategy that needs a stepper and brings none, and settings that one cannot serve."""
        strategy = self.trainer.strategy
        if type(strategy) not in (SingleDeviceStrategy, DDPStrategy) and not is_sharded(strategy):
            raise ConfigError(
                f"trainer.strategy {type(strategy).__name__} is not supported; "
                "use --config ddp, fsdp, deepspeed-zero1, -zero2 or -zero3"
            )
        if is_sharded(strategy):
            strategy.check(self)
        if self.cuda_graph and not self._can_graph:
            raise ConfigError(
                "model.cuda_graph true needs one CUDA device, without --config ddp, and "
                "model.recompute_activations false; leave it out"
            )
        if self.optimizer_kind == "muon" and is_sharded(strategy):
            raise ConfigError(
                f"model.optimizer muon needs whole matrices, which {type(strategy).__name__} shards; "
                "use --config ddp, or --model.optimizer adamw"
            )

    @property
    def arm(self) -> str:
        """What tells a run from its siblings, other seeds aside."""
        return self.given_arm or arm_name(self.sink, self.window, self.mask_documents)

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            self.schedule_kind,
            self.learning_rate,
            self.min_lr_ratio,
            self.warmup_steps,
            self.decay_steps,
            self.trainer.max_steps,
        )

    # -- training ---------------------------------------------------------------------------------

    def training_step(self, windows: Tensor, batch_idx: int) -> None:
        """One optimizer step on this rank's share of a global batch: int64[rows, seq + 1]."""
        self.stepper(windows, self.schedule.learning_rate(self.trainer.global_step))

    def mean_loss(self, windows: Tensor, rows: int) -> Tensor:
        """What a micro-batch adds to the mean loss of its rank's ``rows`` samples, in nats: float[]."""
        inputs, targets = self._inputs_and_targets(windows)
        scored_each = targets.shape[1] - max(0, self.sink.count - self._data.score_sink)
        summed: Tensor = self.require_network(inputs, targets)
        return summed / (rows * scored_each)

    @property
    def rows_at_once(self) -> int:
        """Samples of a micro-batch."""
        return self._data.rows_at_once

    @property
    def stepper(self) -> Stepper:
        assert self._stepper is not None, "training has not started"
        return self._stepper

    def _inputs_and_targets(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        return insert_sinks(windows, self.sink_ids, self._data.score_sink)

    # -- held-out loss ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._val_sum = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score the targets that all arms share; batch as ``WindowData.val_dataloader`` gives it."""
        windows, is_real = batch
        inputs, targets = self._inputs_and_targets(windows)
        is_shared = torch.zeros_like(targets, dtype=torch.bool)
        is_shared[:, shared_targets(targets.shape[1], self.sink.count)] = True
        scored = targets.masked_fill(~(is_shared & is_real[:, None]), IGNORED)
        with fast_attention():
            loss = self.require_network(inputs, scored)
        self._val_sum += torch.stack((loss.to(torch.float64), (scored != IGNORED).sum()))

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self._val_sum, reduce_op="sum")
        assert isinstance(total, Tensor)
        self.log("val/loss", (total[0] / total[1]).float(), logger=False)

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self._data
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])  # in a CUDA graph a tensor
        checkpoint[CHECKPOINT_KEY] = {
            "format_version": FORMAT_VERSION,
            "code_version": __version__,
            "model": self.require_network.config.to_dict(),
            "arm": self.arm,
            "optimizer": self.optimizer_kind,
            "seed": self.seed,
            "data_fingerprint": data.manifest.fingerprint,
            "samples_consumed": data.samples_consumed,
            "tokens_seen": data.samples_consumed * data.seq_len,
            "rng": random_states(),
            "guard": self.stepper.guard.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint[CHECKPOINT_KEY]

    def on_train_start(self) -> None:
        self._stepper = self._stepper_class()(self)
        if self._resumed:
            restore_random_states(self._resumed["rng"])
            if "guard" in self._resumed:  # which the first checkpoints had not
                self.stepper.guard.load_state_dict(self._resumed["guard"])
        self._apply_optimizer_settings()

    def teardown(self, stage: str) -> None:
        self._stepper = None  # a CUDA graph holds the memory of a step

    def _stepper_class(self) -> type[Stepper]:
        strategy = self.trainer.strategy
        if is_sharded(strategy):
            return strategy.stepper
        num_parameters = sum(p.numel() for p in self.require_network.parameters())
        is_small = self.is_compiled and num_parameters <= GRAPHED_PARAMETERS
        is_graphed = self._can_graph and (is_small if self.cuda_graph is None else self.cuda_graph)
        return GraphedStepper if is_graphed else Stepper

    @property
    def _can_graph(self) -> bool:
        strategy = self.trainer.strategy
        on_one_gpu = isinstance(strategy, SingleDeviceStrategy) and strategy.root_device.type == "cuda"
        return on_one_gpu and not self.recompute_activations

    def _apply_optimizer_settings(self) -> None:
        """Let the settings win over those that an optimizer's state brought from a checkpoint."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        groups_of = muon_groups if self.optimizer_kind == "muon" else parameter_groups
        fresh_groups = groups_of(self.require_network, self.weight_decay)
        for group, fresh in zip(optimizer.param_groups, fresh_groups, strict=True):
            group.update(weight_decay=fresh["weight_decay"], betas=self.betas, eps=self.eps)

    @property
    def require_network(self) -> GPTNeoX:
        assert self.network is not None, "configure_model has not run"
        return self.network

    @property
    def _data(self) -> WindowData:
        return cast(WindowData, cast(Any, self.trainer).datamodule)
