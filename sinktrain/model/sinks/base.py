"""What a sink kind may add to the attention of a layer: a null slot, or a scale of what heads put out.

A kind is one file beside this one: a subclass of ``AttentionSink`` under ``@register``. Training, decoder,
exact evaluation, telemetry and export work by what its methods return and know no kind by name.

Axes: batch, seq, head, head_dim, hidden.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sinktrain.model.rotary import angle_dtype, apply_rotary, rotary_angles

Loading = Literal["plain", "prefix", "code"]
"""How transformers loads an export: as stock GPT-NeoX, with a cache of one slot besides, or by our file."""


class NullSlot(NamedTuple):
    """A slot without a token, which every query of a layer sees; a part that is None is zero.

    The softmax of a query has one more term: its score is ``query . key / sqrt(head_dim) + score``, and it
    adds its weight times ``value`` to the output. The slot lies right in front of the first token's, and like
    a sink's its distance stops growing once a stream's cache is full.

    Attributes:
        key: float[head, head_dim], unrotated: as if it stood at position 0 and the first token at 1.
        score: float[head].
        value: float[head, head_dim].
    """

    key: Tensor | None = None
    score: Tensor | None = None
    value: Tensor | None = None

    def in_front(self, rotary_steps: Tensor) -> NullSlot:
        """The same, dense, with its key rotated to where it stands when the first token is at position 0."""
        key, score, value = (part if part is None else part.contiguous() for part in self)
        if key is not None:
            place = torch.full((1,), -1, device=rotary_steps.device)
            key = apply_rotary(key, *rotary_angles(place, rotary_steps, angle_dtype(key.dtype)))
        return NullSlot(key, score, value)

    def in_float32(self) -> NullSlot:
        """The same as constants for kernels: float32 and without gradients."""
        return NullSlot(*(part if part is None else part.detach().float() for part in self))


class AttentionSink(nn.Module):
    """What a kind adds to one layer; the kinds ``none`` and ``token`` add nothing.

    Parameters of one dimension are trained as biases are, without weight decay; matrices as matrices are.

    Args:
        hidden_size: width of the residual stream.
        num_heads: attention heads.

    Attributes:
        name: the value of ``sink.kind``.
        about: one clause for help and model cards.
        has_tokens: whether placeholder tokens stand in front of every sample.
        loads_as: see ``Loading``.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    has_tokens: ClassVar[bool] = False
    loads_as: ClassVar[Loading] = "plain"

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()

    def initialize(self, generator: torch.Generator, std: float) -> None:
        """Draw the parameters in place, on the CPU, as ``sinktrain.model.init`` draws others with ``std``."""
        assert not list(self.parameters()), f"the kind {self.name} does not say what it starts with"

    def null_slot(self) -> NullSlot | None:
        """The layer's null slot, if the kind has one."""
        return None

    def output_gate(self) -> nn.Linear | None:
        """A layer from the normalised input to the heads; its sigmoid multiplies what they put out."""
        return None

    def output_scale(self, x: Tensor) -> Tensor | None:
        """What each head's output is multiplied by, if the kind does that; the gate, unless overridden.

        Args:
            x: float[..., hidden], the layer's normalised input.

        Returns:
            float[..., head].
        """
        gate = self.output_gate()
        return None if gate is None else torch.sigmoid(gate(x))


KINDS: dict[str, type[AttentionSink]] = {}
"""All kinds by name; ``sinktrain.model.sinks`` fills it."""


def register(kind: type[AttentionSink]) -> type[AttentionSink]:
    """Let ``sink.kind`` name this kind."""
    assert kind.name not in KINDS, f"two kinds are called {kind.name}"
    KINDS[kind.name] = kind
    return kind
