"""The model card of an exported folder: what the model is, how to use it, and no more than is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sinktrain import __version__
from sinktrain.model.checkpoints import ModelSource
from sinktrain.model.config import ModelConfig
from sinktrain.model.sinks.base import KINDS
from sinktrain.publishing.card_compared import Compared
from sinktrain.publishing.card_metadata import licence_id, metadata
from sinktrain.publishing.card_picture import streaming_picture
from sinktrain.publishing.card_results import results_parts
from sinktrain.publishing.card_run import Training
from sinktrain.publishing.card_training import settings_yaml, training_rows
from sinktrain.publishing.card_use import FOUND_IN, USE, WHY, stream_words, token_words
from sinktrain.report import findings
from sinktrain.report.markdown import escaped

SMALL = 1_000_000_000


@dataclass(frozen=True)
class CardOptions:
    """What a card says besides what the model itself tells.

    Args:
        repo_id: the name that the model is loaded by, ORG/NAME; the folder's name when None.
        licence: SPDX id; the card states none when None.
        results: a ``results.json`` that holds this model, or its folder.
        comparison: the whole comparison lies in ``comparison/`` beside the card.
        revision: branch that the model is on, where that is not the one which is loaded without a word.
    """

    repo_id: str | None = None
    licence: str | None = None
    results: Path | None = None
    comparison: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Card:
    """README.md, and the picture that it shows, if any."""

    text: str
    picture: str | None


def model_card(
    name: str,
    config: ModelConfig,
    num_parameters: int,
    origin: ModelSource,
    options: CardOptions,
    training: Training,
    compared: Compared | None,
) -> Card:
    """The same of everything gives the same bytes.

    Args:
        name: what the model is loaded by where ``options`` give no repository.
    """
    name = options.repo_id or name
    typed, quoted = name, f'"{name}"'
    if options.revision is not None:
        typed, quoted = f"{name}@{options.revision}", f'"{name}", revision="{options.revision}"'
    kind = KINDS[config.sink.kind]
    picture = streaming_picture(compared.shown) if compared else None
    parts = [
        metadata(name.rpartition("/")[2], config.sink, options.licence, training, compared),
        f"# {name.rpartition('/')[2]}",
        f"A GPT-NeoX language model of {num_parameters:,} parameters, exported by sinktrain, which found "
        f"{FOUND_IN[kind.loads_as]} to give the same logits.",
        "## Sink",
        f"`{kind.name}`: {kind.about}. {WHY[kind.loads_as]}",
        token_words(config.sink),
        "## Use",
        USE[kind.loads_as].replace('"NAME"', quoted),
        "Batches are padded on the left, behind the attention mask: pass the mask that the tokenizer "
        "returns.",
        stream_words(typed),
        "## Facts",
        _facts(config, origin),
        *_training_parts(training, config, origin),
        *(results_parts(compared, picture is not None, options.comparison) if compared else []),
        "## Limitations",
        _bullets(_limitations(config, num_parameters, origin, training, compared)),
        "## Licence",
        _licence(options.licence),
        "## Citation",
        _CITATION,
    ]
    return Card("\n\n".join(parts) + "\n", picture)


def _facts(config: ModelConfig, origin: ModelSource) -> str:
    network = config.network
    facts = {
        "layers x width x heads": f"{network.num_hidden_layers} x {network.hidden_size} x "
        f"{network.num_attention_heads}",
        "vocabulary rows": f"{config.vocab_size:,}",
        "positions trained on": f"{network.max_position_embeddings:,}",
        "tokens seen": None if origin.tokens_seen is None else f"{origin.tokens_seen:,}",
        "seed": None if origin.seed is None else str(origin.seed),
        "arm": None if origin.arm is None else escaped(origin.arm),
    }
    return _table("fact", {fact: value for fact, value in facts.items() if value is not None})


def _training_parts(training: Training, config: ModelConfig, origin: ModelSource) -> list[str]:
    rows = training_rows(training, config, origin)
    parts = ["## Training", _table("training", rows)] if rows else []
    if training.settings:
        parts += [
            "<details><summary>Settings</summary>",
            f"```yaml\n{settings_yaml(training)}```",
            "`sinktrain fit --config` reads them; `--data.path` and `--run` are yours.",
            "</details>",
        ]
    return parts


def _table(title: str, rows: dict[str, str]) -> str:
    """Two columns of Markdown; the values may hold code and links, and no bars."""
    return "\n".join([f"| {title} | |", "| --- | --- |", *(f"| {name} | {rows[name]} |" for name in rows)])


def _bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _limitations(
    config: ModelConfig,
    num_parameters: int,
    origin: ModelSource,
    training: Training,
    compared: Compared | None,
) -> list[str]:
    size = "a small model" if num_parameters < SMALL else "a model"
    seen = "" if origin.tokens_seen is None else f" that has seen {origin.tokens_seen:,} tokens"
    text = f" All that it has seen is `{training.corpus.name}`." if training.corpus else ""
    seed = "" if origin.seed is None else f" It is of one seed, {origin.seed}; another may differ."
    return [
        f"It is {size}{seen}: it continues text, follows no instructions, and states falsehoods as easily as "
        f"facts.{text}{seed}",
        "Streaming is not memory: a token that has left the window is forgotten, however long the stream "
        f"goes on. The model was trained on samples of {config.network.max_position_embeddings:,} tokens.",
        "Nothing here tested it for bias, harm, privacy or truth. Don't use it where somebody relies on what "
        "it writes.",
        *(map(escaped, findings.limits(compared.results)) if compared else []),
    ]


def _licence(licence: str | None) -> str:
    return "Not stated: ask whoever published it." if licence is None else f"`{licence_id(licence)}`"


_CITATION = f"""The sink and streaming, [arXiv 2309.17453](https://arxiv.org/abs/2309.17453):

```bibtex
@inproceedings{{xiao2024efficient,
  title = {{Efficient Streaming Language Models with Attention Sinks}},
  author = {{Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike}},
  booktitle = {{International Conference on Learning Representations}},
  year = {{2024}},
  eprint = {{2309.17453}},
  archivePrefix = {{arXiv}}
}}
```

The software:

```bibtex
@software{{sinktrain,
  title = {{sinktrain: GPT-NeoX models with or without an attention sink}},
  version = {{{__version__}}}
}}
```"""
