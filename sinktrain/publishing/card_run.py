"""What a run wrote down of a model's training, and of that only what may be public.

Settings are those of a list, of plain values; no path, no name of a machine and no text is among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sinktrain.data.shards import read_manifest
from sinktrain.errors import DataError
from sinktrain.model.checkpoints import CHECKPOINT_KEY, checkpoint_facts
from sinktrain.model.config import NetworkConfig
from sinktrain.model.hub import download, is_hub_id
from sinktrain.report.wording import printable

PUBLIC_FACTS = ("run_id", "data_fingerprint", "code_version")
"""What an export's config.json says of the training, besides what ``ModelSource`` holds."""

PUBLIC_SETTINGS = (
    "seed_everything",
    *(f"model.network.{size.name}" for size in fields(NetworkConfig)),
    "model.sink.kind",
    "model.sink.count",
    "model.optimizer",
    "model.learning_rate",
    "model.schedule",
    "model.warmup_steps",
    "model.decay_steps",
    "model.min_lr_ratio",
    "model.weight_decay",
    "model.betas",
    "model.eps",
    "model.clip_norm",
    "model.spike_sigma",
    "model.max_skipped_steps",
    "model.recompute_activations",
    "model.window",
    "model.mask_documents",
    "data.seq_len",
    "data.global_batch",
    "data.micro_batch",
    "data.score_sink",
    "data.val_windows",
    "trainer.max_steps",
    "trainer.precision",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
"""Of config.yaml."""

_WORD = re.compile(r"[A-Za-z][\w.+-]{0,31}|\d[\w.+-]{0,31}")
_DEVICE = re.compile(r"[\w(][\w .,()@+-]{0,79}")
_WANDB_RUN = re.compile(r"https://[\w.:-]+/[\w./-]+")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")
_STEP = re.compile(r"step-(\d{8,})\.ckpt")


@dataclass(frozen=True)
class Corpus:
    """The prepared shards that a run read.

    Args:
        name: of the text: a Hub dataset's id, otherwise the last part of its location.
        is_dataset: whether it is a Hub dataset.
        train_tokens, val_tokens: of its splits.
        documents: of the training split.
    """

    name: str
    is_dataset: bool
    train_tokens: int
    val_tokens: int
    documents: int


@dataclass(frozen=True)
class Training:
    """What is known of how a model was trained, fit to be published; None and empty for the rest.

    Args:
        facts: of ``PUBLIC_FACTS``, those known.
        settings: of ``PUBLIC_SETTINGS``, by their dotted names.
        step: optimizer steps behind it.
        val_loss_nats: held-out loss of this very checkpoint.
        corpus: None also where its shards are no longer where the run read them.
        base_model: the Hub id that training started from.
        has_base: whether it started from another model at all.
        hardware: words for what it ran on.
        train_seconds: how long, on all devices at once.
        num_devices: how many those were.
        wandb_url: its run at Weights & Biases.
    """

    facts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    val_loss_nats: float | None = None
    corpus: Corpus | None = None
    base_model: str | None = None
    has_base: bool = False
    hardware: str | None = None
    train_seconds: float | None = None
    num_devices: int | None = None
    wandb_url: str | None = None


def read_training(source: str | Path, revision: str | None = None) -> Training:
    """What a MODEL's run folder or checkpoint tells, or an export's config.json; a damaged file, nothing.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(source).expanduser()
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        folder = path if path.is_dir() else download(str(source), revision)
        return Training(_public(_mapping(_read(folder / "config.json", json.loads), CHECKPOINT_KEY)))
    facts = checkpoint_facts(checkpoint)
    run = checkpoint.parent.parent
    manifest = _read(run / "manifest.json", json.loads)
    identity = _mapping(manifest, "identity")
    if not identity or identity.get("data_fingerprint") != facts.get("data_fingerprint"):
        return Training(_public(facts))
    config = _read(run / "config.yaml", yaml.safe_load)
    init_from = identity.get("init_from")
    step = _STEP.fullmatch(checkpoint.resolve().name)
    is_newest = manifest.get("tokens_seen") == facts.get("tokens_seen")
    hardware = _mapping(manifest, "hardware")
    return Training(
        facts=_public({**facts, "run_id": manifest.get("run_id")}),
        settings=_public_settings(config),
        step=int(step[1]) if step else None,
        val_loss_nats=_number(manifest.get("val_loss_nats")) if is_newest else None,
        corpus=_corpus(_mapping(config, "data").get("path"), facts.get("data_fingerprint")),
        base_model=init_from if isinstance(init_from, str) and is_hub_id(init_from) else None,
        has_base=init_from is not None,
        hardware=_matching(_DEVICE, hardware.get("device")),
        train_seconds=_number(hardware.get("train_seconds")) if is_newest else None,
        num_devices=_count(hardware.get("num_devices")),
        wandb_url=_matching(_WANDB_RUN, manifest.get("wandb_url")),
    )


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _mapping(value: dict[str, Any], key: str) -> dict[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _public(facts: dict[str, Any]) -> dict[str, str]:
    hexadecimal = re.compile(r"[0-9a-f]{4,64}")
    forms = {"run_id": hexadecimal, "data_fingerprint": hexadecimal, "code_version": _WORD}
    found = {name: _matching(forms[name], facts.get(name)) for name in PUBLIC_FACTS}
    return {name: value for name, value in found.items() if value is not None}


def _public_settings(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PUBLIC_SETTINGS:
        *sections, key = name.split(".")
        section = config
        for part in sections:
            section = _mapping(section, part)
        if key in section and _is_plain(section[key]):
            found[name] = section[key]
    return found


def _is_plain(value: Any) -> bool:
    """Numbers, words that are no path and no secret, and short lists of them."""
    if isinstance(value, list):
        return len(value) <= 16 and all(_is_plain(entry) and not isinstance(entry, list) for entry in value)
    return value is None or isinstance(value, (bool, int, float)) or _matching(_WORD, value) is not None


def _corpus(path: Any, fingerprint: Any) -> Corpus | None:
    try:
        manifest = read_manifest(Path(str(path)))
    except (DataError, OSError):
        return None
    if manifest.fingerprint != fingerprint:
        return None
    train, val = manifest.splits["train"], manifest.splits["val"]
    location = str(manifest.source.get("location", ""))
    is_dataset = "subset" in manifest.source and _DATASET.fullmatch(location) is not None
    name = location if is_dataset else printable(Path(location).name)
    return Corpus(name, is_dataset, train.tokens, val.tokens, train.documents)


def _matching(form: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < float("inf") else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
