"""A model card's table of the training, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from sinktrain.model.checkpoints import ModelSource
from sinktrain.model.config import ModelConfig
from sinktrain.publishing.card_run import Training
from sinktrain.training.throughput import flops_per_token

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the matrices of the layers, AdamW for the rest"}
_PRECISIONS = {"32-true": "float32", "32": "float32", "bf16": "bfloat16 products, float32 weights"}
_PRECISIONS["bf16-mixed"] = _PRECISIONS["bf16"]


def training_rows(training: Training, config: ModelConfig, origin: ModelSource) -> dict[str, str]:
    """What a table of the training says, by what it is about; empty where nothing is known."""
    rows = {
        **_data_rows(training, origin.tokens_seen),
        "started from": _base_words(training),
        **(_recipe_rows(training) if training.settings else {}),
        "held-out loss": None if training.val_loss_nats is None else f"{training.val_loss_nats:.4f} nats",
        "FLOPs": _flops_words(training, config, origin.tokens_seen),
        "hardware": _hardware_words(training),
        "sinktrain that trained it": training.facts.get("code_version"),
        "run": training.wandb_url and f"[Weights & Biases]({training.wandb_url})",
    }
    return {name: words for name, words in rows.items() if words}


def settings_yaml(training: Training) -> str:
    """The public settings as the YAML that ``sinktrain fit --config`` reads."""
    nested: dict[str, Any] = {}
    for name, value in training.settings.items():
        *sections, key = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    text: str = yaml.safe_dump(nested, sort_keys=False)
    return text


def _data_rows(training: Training, tokens_seen: int | None) -> dict[str, str | None]:
    corpus, fingerprint = training.corpus, training.facts.get("data_fingerprint")
    hashed = f"`{fingerprint}`" if fingerprint else None
    if corpus is None:
        return {"data fingerprint": hashed}
    link = f"[{corpus.name}](https://huggingface.co/datasets/{corpus.name})"
    passes = f"{tokens_seen / corpus.train_tokens:.2f}" if tokens_seen and corpus.train_tokens else None
    return {
        "text": link if corpus.is_dataset else f"`{corpus.name.replace('`', '')}`",
        "tokens in it": f"{corpus.train_tokens:,} in {corpus.documents:,} documents, and "
        f"{corpus.val_tokens:,} held out",
        "passes over it": passes,
        "data fingerprint": hashed,
    }


def _base_words(training: Training) -> str | None:
    if training.base_model:
        return f"the weights of [{training.base_model}](https://huggingface.co/{training.base_model})"
    return "the weights of another model" if training.has_base else None


def _recipe_rows(training: Training) -> dict[str, str | None]:
    """Of a run's settings; rows of which a part is not known are left out."""
    known = training.settings
    rows = {
        "optimizer": lambda: (
            f"{_OPTIMIZERS[known.get('model.optimizer', 'adamw')]}; betas "
            f"{' and '.join(f'{beta:g}' for beta in known['model.betas'])}, eps {known['model.eps']:g}, "
            f"weight decay {known['model.weight_decay']:g}, gradients clipped to "
            f"{known['model.clip_norm']:g}"
        ),
        "learning rate": lambda: (
            f"{known['model.learning_rate']:g} at its peak, then {known['model.schedule']} to "
            f"{known['model.min_lr_ratio']:.0%} of it; warm-up of {_steps(known, 'model.warmup_steps', '1%')}"
            + (f", decay of {_steps(known, 'model.decay_steps', '20%')}")
            * (known["model.schedule"] == "wsd")
        ),
        "batch": lambda: (
            f"{known['data.global_batch']:,} samples of {known['data.seq_len']:,} tokens: "
            f"{known['data.global_batch'] * known['data.seq_len']:,} tokens a step"
        ),
        "steps": lambda: (
            f"{known['trainer.max_steps']:,}"
            if training.step in (None, known["trainer.max_steps"])
            else f"{training.step:,} of {known['trainer.max_steps']:,}"
        ),
        "precision": lambda: _PRECISIONS[str(known["trainer.precision"] or "32-true")],
    }
    return {name: _known(words) for name, words in rows.items()}


def _known(words: Callable[[], str]) -> str | None:
    try:
        return words()
    except (KeyError, TypeError, ValueError):
        return None


def _steps(known: dict[str, Any], name: str, default: str) -> str:
    return f"{default} of the steps" if known[name] is None else f"{known[name]:,} steps"


def _flops_words(training: Training, config: ModelConfig, tokens_seen: int | None) -> str | None:
    seq_len = training.settings.get("data.seq_len")
    if not tokens_seen or not isinstance(seq_len, int):
        return None
    flops = flops_per_token(config.network, config.vocab_size, seq_len) * tokens_seen
    rule = "6 a token for each weight of a matrix product, and attention (PaLM, appendix B)"
    return f"{flops:.2g}: {rule}"


def _hardware_words(training: Training) -> str | None:
    """``8 x NVIDIA H100; its steps took 2.5 hours, 20.0 device-hours``."""
    if training.hardware is None:
        return None
    count = training.num_devices or 1
    device = "CPU" if training.hardware == "cpu" else training.hardware
    words = f"{count} x {device}" if count > 1 else device
    if training.train_seconds is None:
        return words
    hours = training.train_seconds / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{training.train_seconds / 60:.1f} minutes"
    devices = f", {hours * count:.1f} device-hours" if count > 1 and hours >= 1 else ""
    return f"{words}; its steps took {spent}{devices}"
