"""What a model is: its sizes, under their Hub names, and its sink."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sinktrain.model.sinks  # noqa: F401  (registers the kinds)
from sinktrain.data.tokenizer import RESERVED_SINKS
from sinktrain.errors import ConfigError, did_you_mean
from sinktrain.model.sinks.base import KINDS


@dataclass(frozen=True)
class SinkConfig:
    """What the model is trained to lean on when it has nothing to say.

    Args:
        kind: ``none`` (vanilla softmax), ``token`` (placeholder tokens in front of every sample, StreamingLLM
            section 3.3), ``zero`` (one more score of 0 in the softmax), ``logit`` (a learned one per head),
            ``gate`` (a sigmoid on each head's output), ``k_bias`` or ``kv_bias`` (a learned key, and value).
        count: number of sink tokens, 1 to 8; counts only for kind ``token``.
        token_ids: their vocabulary rows; taken from the shards when empty.
    """

    kind: str = "none"
    count: int = 1
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = did_you_mean(self.kind, KINDS)
            raise ConfigError(f'model.sink.kind "{self.kind}" is not one of {", ".join(sorted(KINDS))}{hint}')
        if not KINDS[self.kind].has_tokens:
            object.__setattr__(self, "count", 0)
            object.__setattr__(self, "token_ids", ())
        elif not 1 <= self.count <= RESERVED_SINKS:
            raise ConfigError(f"model.sink.count is {self.count}; use 1 to {RESERVED_SINKS}")
        if self.token_ids and len(self.token_ids) != self.count:
            raise ConfigError(
                f"model.sink.token_ids has {len(self.token_ids)} ids for a count of {self.count}; "
                "give one for each"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": self.count, "token_ids": list(self.token_ids)}


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a GPT-NeoX network.

    Args:
        hidden_size: width of the residual stream.
        num_hidden_layers: transformer blocks.
        num_attention_heads: heads; must divide ``hidden_size``.
        intermediate_size: width of the MLP; 4 x ``hidden_size`` when null.
        vocab_size: rows of the embedding; from the shards (padded to a multiple of 128) when null.
        max_position_embeddings: positions trained on; ``data.seq_len`` in a training run.
        rotary_pct: share of each head that is rotated, 0 to 1.
        rotary_emb_base: base of the rotary frequencies.
        use_parallel_residual: attention and MLP read the same input (Pythia) or follow each other.
        attention_bias: biases in the attention's linear layers.
        hidden_act: ``gelu`` (erf, as in Pythia's Hub checkpoints), ``gelu_new``, ``gelu_fast``,
            ``gelu_pytorch_tanh``, ``relu`` or ``silu``.
        layer_norm_eps: epsilon of every LayerNorm.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    use_parallel_residual: bool = True
    attention_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if min(self.hidden_size, self.num_hidden_layers, self.num_attention_heads) < 1:
            raise ConfigError(
                f"a network of hidden_size {self.hidden_size}, num_hidden_layers {self.num_hidden_layers} "
                f"and num_attention_heads {self.num_attention_heads} is empty; use 1 or more of each"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads; "
                "change num_attention_heads or hidden_size"
            )
        if not 0 <= self.rotary_pct <= 1 or self.rotary_ndims % 2:
            raise ConfigError(
                f"rotary_pct {self.rotary_pct} rotates {self.rotary_ndims} of {self.head_dim} dimensions; "
                "use a share from 0 to 1 that gives an even number"
            )
        if self.hidden_act not in ACTIVATIONS:
            hint = did_you_mean(self.hidden_act, ACTIVATIONS)
            raise ConfigError(f'hidden_act "{self.hidden_act}" is not one of {", ".join(ACTIVATIONS)}{hint}')

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_ndims(self) -> int:
        return int(self.head_dim * self.rotary_pct)


ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")

PYTHIA: dict[str, NetworkConfig] = {
    name: NetworkConfig(hidden, layers, heads, vocab_size=50304)
    for name, layers, hidden, heads in [
        ("pythia-14m", 6, 128, 4),
        ("pythia-31m", 6, 256, 8),
        ("pythia-70m", 6, 512, 8),
        ("pythia-160m", 12, 768, 12),
        ("pythia-410m", 24, 1024, 16),
        ("pythia-1b", 16, 2048, 8),
        ("pythia-1.4b", 24, 2048, 16),
    ]
}
"""The seven Pythia sizes (EleutherAI/pythia ``models/*/*.yml``), all trained on 2048 positions."""


@dataclass(frozen=True)
class ModelConfig:
    """A network and its sink: all that decoder, evaluator and export need to know of a checkpoint."""

    network: NetworkConfig
    sink: SinkConfig = SinkConfig()

    def __post_init__(self) -> None:
        if self.sink.kind == "token" and not self.sink.token_ids:
            raise ConfigError("a model with sink tokens needs their ids: model.sink.token_ids")
        bad = [i for i in self.sink.token_ids if not 0 <= i < self.vocab_size]
        if bad:
            raise ConfigError(f"sink token id {bad[0]} is outside the vocabulary of {self.vocab_size} rows")

    @property
    def vocab_size(self) -> int:
        if self.network.vocab_size is None:
            raise ConfigError("model.network.vocab_size is not set; train on shards, or set it")
        return self.network.vocab_size

    def to_dict(self) -> dict[str, Any]:
        return {"network": asdict(self.network), "sink": self.sink.to_dict()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ModelConfig:
        sink = value["sink"]
        return cls(
            NetworkConfig(**value["network"]),
            SinkConfig(sink["kind"], sink["count"], tuple(sink["token_ids"])),
        )
