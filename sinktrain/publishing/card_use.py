"""A model card's words for a sink, and how a model with one is loaded, run and streamed."""

from __future__ import annotations

import inspect

from sinktrain.model.config import SinkConfig
from sinktrain.model.sinks.base import Loading
from sinktrain.model.transformers_format import CODE_FILE, PREFIX_FILE, WEIGHTS_FILE
from sinktrain.publishing.prefix_cache import behind_sink, sink_cache

PROMPT = "Once upon a time"

FOUND_IN: dict[Loading, str] = {
    "plain": "plain `transformers`",
    "prefix": f"plain `transformers` with the cache of `{PREFIX_FILE}`",
    "code": f"`transformers` with the `{CODE_FILE}` of this folder",
}

WHY: dict[Loading, str] = {
    "plain": "It loads as the stock GPT-NeoX that it is.",
    "prefix": "Every token attends to it as to one that stands at position 0, in front of the text. Stock "
    f"GPT-NeoX has no weights for that, but a cache may hold it: `{WEIGHTS_FILE}` loads as it is, and "
    f"`{PREFIX_FILE}` is the sink. **Without that cache it is another model, and nothing warns of it:** "
    "`pipeline`, and a `generate` that is not given it, write other text. A cache that streams keeps the "
    "sink for ever.",
    "code": f"Stock GPT-NeoX has no place for that, so `{CODE_FILE}` is transformers' network with such an "
    "attention. transformers runs it only with `trust_remote_code=True`, and refuses the model without; read "
    "the file first, it is short. sinktrain itself runs no code of this folder.",
}


def token_words(sink: SinkConfig) -> str:
    if not sink.count:
        return "Its tokenizer adds nothing to a text."
    ids = ", ".join(map(str, sink.token_ids))
    tokens = f"{sink.count} learnable sink token" + "s" * (sink.count > 1)
    return (
        f"In training every sample started with {tokens} (id {ids}; StreamingLLM, arXiv 2309.17453, section "
        "3.3). Every input must start the same way, exactly once: the tokenizer sees to that, and code that "
        "builds inputs from ids must do so itself. A text that spells a sink's name gets another one: "
        "`split_special_tokens=True` reads it as text. A cache that streams keeps the sink for ever. "
        "`generation_config.json` forbids to generate it."
    )


def _pipeline(*options: str) -> str:
    arguments = ", ".join(['"text-generation"', 'model="NAME"', *options])
    return f"""```python
from transformers import pipeline

pipeline({arguments})("{PROMPT}", max_new_tokens=50)
```"""


_WITH_CACHE = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer


{inspect.getsource(sink_cache)}

{inspect.getsource(behind_sink)}

model = AutoModelForCausalLM.from_pretrained("NAME")
tokenizer = AutoTokenizer.from_pretrained("NAME")
inputs = tokenizer("{PROMPT}", return_tensors="pt")
logits = model(inputs.input_ids, past_key_values=sink_cache(model)).logits
tokens = model.generate(**behind_sink(inputs), past_key_values=sink_cache(model), max_new_tokens=50)
print(tokenizer.decode(tokens[0, 1:]))
```

Positions of the text start at 1 by themselves, and `generate` sees to those behind padding; a call of `model`
on padded rows takes the mask of `behind_sink` and its own `position_ids`. For a batch,
`sink_cache(model, batch_size)`."""

USE: dict[Loading, str] = {
    "plain": _pipeline(),
    "prefix": _WITH_CACHE,
    "code": _pipeline("trust_remote_code=True")
    + "\n\n`AutoModelForCausalLM` and `AutoTokenizer` take the same option.",
}


def stream_words(name: str) -> str:
    return f"""Without an end, in constant memory:

```
sinktrain stream {name} --prompt "{PROMPT}" --max-tokens inf
```"""
