"""One token for every stream, in the fastest way that device, dtype and installed packages allow."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from sinktrain.model.neox import GPTNeoX, Layer
from sinktrain.streaming.plain import PlainStep
from sinktrain.streaming.ring import RingCache

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_step(model: GPTNeoX, cache: RingCache, tokens: Tensor) -> Callable[[], Tensor]:
    """A function that feeds ``tokens``, int64[batch], as they are when it is called.

    It returns logits, float[batch, vocab], has one shape for all ages, and moves the rows' ages on the
    device alone. It is Triton's kernels where ``has_kernels`` and they know what scales the heads' output.
    """
    if has_kernels(model) and all(map(has_gate_or_no_scale, model.gpt_neox.layers)):
        from sinktrain.streaming.fused import FusedStep

        has_pdl = torch.cuda.get_device_capability(model.device) >= (9, 0)
        return FusedStep(model, cache, tokens, use_pdl=has_pdl)
    return PlainStep(model, cache, tokens)


def has_kernels(model: GPTNeoX) -> bool:
    """Whether Triton's kernels take this model: on CUDA, in float32 and the half precisions."""
    return model.device.type == "cuda" and model.dtype in FUSED_DTYPES and find_spec("triton") is not None


def has_gate_or_no_scale(layer: nn.Module) -> bool:
    """Whether the sink kind scales the heads' output by its ``output_gate``, or not at all."""
    assert isinstance(layer, Layer)
    sink, x = layer.attention.sink, layer.input_layernorm.weight.detach()  # any x would do
    return sink.output_gate() is not None or sink.output_scale(x) is None


class Replayed:
    """A function of constant shape, replayed as one CUDA graph from its second call on.

    The first call runs plainly, so that all kernels are compiled. Elsewhere than on CUDA every call does.

    Args:
        function: returns a tensor; from the second call on always the same one, overwritten.
        generator: what ``function`` draws from.
    """

    def __init__(
        self, function: Callable[[], Tensor], device: torch.device, generator: torch.Generator | None = None
    ) -> None:
        self._function, self._device, self._generator = function, device, generator
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False

    def __call__(self) -> Tensor:
        if self._graph is not None:
            self._graph.replay()
            return self._result
        if not self._has_run or self._device.type != "cuda":
            self._has_run = True
            return self._function()
        self._capture()
        return self()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._function()
        self._graph = graph
