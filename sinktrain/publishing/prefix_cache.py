"""How transformers takes a sink that is a slot in front of the text; model cards show this very code."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel


def sink_cache(model: "PreTrainedModel", batch_size: int = 1) -> "DynamicCache":
    """A cache that holds the sink alone. A call fills it up, so give each call a new one."""
    from safetensors.torch import load_file
    from transformers import DynamicCache
    from transformers.utils import cached_file

    revision = getattr(model.config, "_commit_hash", None)
    file = cached_file(model.name_or_path, "prefix_cache.safetensors", revision=revision)
    sink = load_file(file, str(model.device))
    keys, values = (sink[part].to(model.dtype).repeat(1, batch_size, 1, 1, 1) for part in ("keys", "values"))
    return DynamicCache(zip(keys, values, strict=True))


def behind_sink(inputs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Inputs for ``generate``, which counts what is in the cache: any id in the sink's place, unmasked."""
    from torch.nn.functional import pad

    return {name: pad(rows, (1, 0), value=1) for name, rows in inputs.items()}
