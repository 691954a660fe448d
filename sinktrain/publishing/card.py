"""The model card of an exported folder: what the model is, how to use it, and no more than is known."""

from __future__ import annotations

from sinktrain.model.checkpoints import ModelSource
from sinktrain.model.config import ModelConfig, SinkConfig


def model_card(name: str, config: ModelConfig, num_parameters: int, origin: ModelSource) -> str:
    """README.md with the Hub's metadata on top; it claims no licence, since none is known here."""
    return "\n\n".join(
        [
            _metadata(config.sink),
            f"# {name}",
            f"A GPT-NeoX language model of {num_parameters:,} parameters, exported by sinktrain, which found "
            "plain `transformers` to give the same logits.",
            "## Sink",
            _sink(config.sink),
            "## Use",
            _use(name),
            "## Facts",
            _facts(config, origin) + "\n",
        ]
    )


def _metadata(sink: SinkConfig) -> str:
    tags = ["gpt_neox", "sinktrain"] + ["attention-sink"] * (sink.count > 0)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
        ]
    )


def _sink(sink: SinkConfig) -> str:
    if sink.kind == "none":
        return "None: it was trained without a sink token, and its tokenizer adds nothing to a text."
    ids = ", ".join(map(str, sink.token_ids))
    tokens = f"{sink.count} learnable sink token" + "s" * (sink.count > 1)
    return (
        f"In training every sample started with {tokens} (id {ids}; StreamingLLM, arXiv 2309.17453, section "
        "3.3). Every input must start the same way, exactly once: the tokenizer sees to that, and code that "
        "builds inputs from ids must do so itself. A text that spells a sink's name gets another one: "
        "`split_special_tokens=True` reads it as text. A cache that streams keeps the sink for ever. "
        "`generation_config.json` forbids to generate it."
    )


def _use(name: str) -> str:
    return f"""```python
from transformers import pipeline

pipeline("text-generation", model="{name}")("Once upon a time", max_new_tokens=50)
```

Batches are padded on the left, behind the attention mask: pass the mask that the tokenizer returns.

Without an end, in constant memory:

```
sinktrain stream {name} --prompt "Once upon a time" --max-tokens inf
```"""


def _facts(config: ModelConfig, origin: ModelSource) -> str:
    network = config.network
    facts = {
        "layers x width x heads": f"{network.num_hidden_layers} x {network.hidden_size} x "
        f"{network.num_attention_heads}",
        "vocabulary rows": f"{config.vocab_size:,}",
        "positions trained on": f"{network.max_position_embeddings:,}",
        "tokens seen": None if origin.tokens_seen is None else f"{origin.tokens_seen:,}",
        "seed": origin.seed,
        "arm": origin.arm,
    }
    known = [f"| {fact} | {value} |" for fact, value in facts.items() if value is not None]
    return "\n".join(["| fact | value |", "| --- | --- |", *known])
