"""Trained models, loaded from every form they come in."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sinktrain.errors import ConfigError, ModelError, did_you_mean
from sinktrain.model.config import ModelConfig
from sinktrain.model.hub import download, is_hub_id
from sinktrain.model.init import SINK_PART
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.model.transformers_format import (
    PREFIX_FILE,
    WEIGHTS_FILE,
    from_transformers_config,
    from_transformers_weights,
)

CHECKPOINT_KEY = "sinktrain"
"""Where a Lightning checkpoint, and an export's config.json, say what sinktrain knows of the model."""

FORMAT_VERSION = 1
NETWORK_PREFIX = "network."
"""Stands before the network's parameter names in a Lightning checkpoint."""

_LAST = Path("checkpoints", "last.ckpt")
_TOKENIZER = "tokenizer.json"
_DAMAGE = (pickle.UnpicklingError, struct.error, EOFError, LookupError, RuntimeError, ValueError)
"""What the unpickler makes of bytes that were never a checkpoint, or are no longer."""

_FORMS = "a run folder, a Lightning .ckpt, a Hugging Face folder or a Hub id such as EleutherAI/pythia-160m"


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, as ``results.json`` tells it; None where the checkpoint does not say.

    Args:
        name: short label: the folder's name, the run's and the checkpoint's, or the Hub id.
        source: as the user typed it.
        tokens_seen: tokens that it was trained on.
        seed: seed of its run.
        arm: which arm of an experiment it is.
    """

    name: str
    source: str
    tokens_seen: int | None = None
    seed: int | None = None
    arm: str | None = None


def load_model(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> GPTNeoX:
    """Load the weights of any form of MODEL; no tokenizer is needed.

    Args:
        source: run folder, Lightning ``.ckpt``, Hugging Face folder of a GPT-NeoX, or Hub id.
        device: where the weights go.
        dtype: what the weights are cast to, whatever the file holds.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The network in eval mode; its parameters require no gradient.

    Raises:
        ModelError: there is no model, or none that this network can hold.
    """
    found = _find(source, revision)
    config, weights = _read_checkpoint(found.path) if found.is_checkpoint else _read_folder(found.path)
    model = empty_model(config)
    _check_weights(model.state_dict(), weights, found.path)
    # Copied, because what was read are windows on a file that may change later.
    cast = {name: weight.to(device, dtype, copy=True) for name, weight in weights.items()}
    model.load_state_dict(cast, assign=True)
    return model.to(device).eval().requires_grad_(False)  # moves the rotary steps, which no file holds


def empty_model(config: ModelConfig) -> GPTNeoX:
    """The network without weights: its parameters have shapes alone, on the meta device."""
    with torch.device("meta"), _NoInitialization():
        return GPTNeoX(config)


def describe(source: str | Path, revision: str | None = None) -> ModelSource:
    """Say where a model came from, without reading its weights; errors as ``load_model``."""
    found = _find(source, revision)
    if found.is_checkpoint:
        facts = checkpoint_facts(found.path)
    else:
        facts = _read_json(found.path / "config.json").get(CHECKPOINT_KEY, {})
    return ModelSource(found.name, str(source), *(facts.get(key) for key in ("tokens_seen", "seed", "arm")))


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a Lightning checkpoint says of its model and training, without reading its weights.

    Returns:
        ``format_version``, ``model`` (a ``ModelConfig`` as a dict), ``arm``, ``seed``, ``data_fingerprint``,
        ``samples_consumed``, ``tokens_seen`` and what else training wrote.

    Raises:
        ModelError: it is no checkpoint of ours, or is damaged.
    """
    facts: dict[str, Any] = _open_checkpoint(path)[CHECKPOINT_KEY]
    return facts


def find_tokenizer(source: str | Path, revision: str | None = None) -> Path | None:
    """The folder that holds the model's ``tokenizer.json``, or None if the model came without one."""
    folder = _find(source, revision).tokenizer_folder
    return folder if (folder / _TOKENIZER).is_file() else None


def require_tokenizer(source: str | Path, revision: str | None = None) -> Path:
    """The folder that holds the model's ``tokenizer.json``, for commands that need text.

    Raises:
        ModelError: the model came without one.
    """
    folder = find_tokenizer(source, revision)
    if folder is None:
        place = _find(source, revision).tokenizer_folder
        raise ModelError(f"{source} has no tokenizer; put the {_TOKENIZER} of its training into {place}")
    return folder


@dataclass(frozen=True)
class _Found:
    """A model's place on this disk: the file of a Lightning checkpoint, or a folder of transformers."""

    name: str
    path: Path
    is_checkpoint: bool
    tokenizer_folder: Path


def _find(source: str | Path, revision: str | None) -> _Found:
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.exists() and is_hub_id(source):
        folder = download(source, revision)
        return _Found(source, folder, False, folder)
    if revision is not None:
        raise ModelError(f"revision {revision} is for Hub ids and {source} is a path; leave it out")
    if path.is_dir():
        return _find_in_folder(path)
    if path.is_file() and path.suffix == ".ckpt":
        return _find_checkpoint(path)
    if path.is_file():
        raise ModelError(f"{source} is a file of another kind; give {_FORMS}")
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ModelError(f"{source} does not exist{did_you_mean(path.name, siblings)}; give {_FORMS}")


def _find_in_folder(folder: Path) -> _Found:
    name = folder.resolve().name
    if (folder / _LAST).is_file():
        return _Found(name, folder / _LAST, True, folder)
    if (folder / "config.json").is_file():
        return _Found(name, folder, False, folder)
    if older := _newest_readable(folder / _LAST):
        raise ModelError(f"{folder / _LAST} is gone; use {older}")
    raise ModelError(f"{folder} holds no model: neither {_LAST} nor config.json; give {_FORMS}")


def _find_checkpoint(path: Path) -> _Found:
    folder = path.resolve().parent
    name = f"{folder.parent.name}/{path.stem}" if folder.name == _LAST.parent.name else path.stem
    return _Found(name, path, True, folder.parent)


def _read_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    checkpoint = _open_checkpoint(path)
    try:
        config = ModelConfig.from_dict(checkpoint[CHECKPOINT_KEY]["model"])
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelError(f"{path} describes a model that this sinktrain cannot build: {error}") from error
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    return config, {
        name.removeprefix(NETWORK_PREFIX): weight
        for name, weight in weights.items()
        if name.startswith(NETWORK_PREFIX)
    }


def _open_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint of ours; its tensors stay on disk until they are used."""
    checkpoint = _unpickle(path)
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise ModelError(f"{path} is not a checkpoint of sinktrain fit; give {_FORMS}")
    version = checkpoint[CHECKPOINT_KEY].get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has checkpoint format {version}, and this sinktrain reads format {FORMAT_VERSION}; "
            "use the sinktrain that wrote it"
        )
    return checkpoint


def _read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = from_transformers_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    for name, read in ((WEIGHTS_FILE, _read_safetensors), ("pytorch_model.bin", _unpickle)):
        files = _weight_files(folder, name)
        if files:
            weights = from_transformers_weights({k: v for file in files for k, v in read(file).items()})
            return config, weights | _sink_weights(folder, config)
    raise ModelError(f"{folder} holds no weights: neither {WEIGHTS_FILE} nor pytorch_model.bin")


def _sink_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """What the sinks add to the layers, where it lies apart from the weights of a stock GPT-NeoX."""
    kind, path = config.sink.kind, folder / PREFIX_FILE
    if KINDS[kind].loads_as != "prefix":
        return {}
    if not path.is_file():
        raise ModelError(
            f'{folder} lacks {PREFIX_FILE}, where the sink of kind "{kind}" is; copy it from the export'
        )
    return {name: weight for name, weight in _read_safetensors(path).items() if SINK_PART in name}


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The file of that name, or those that its index lists, or none."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        return []
    listed = _read_json(index).get("weight_map")
    parts = {str(part) for part in listed.values()} if isinstance(listed, dict) else {""}
    if not all(part and Path(part).name == part for part in parts):
        raise ModelError(f"{index} does not list files of its own folder; download the folder again")
    files = [folder / part for part in sorted(parts)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{index} lists {missing[0]}, which is not there; download the folder again")
    return files


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}; make or download it again") from error


def _unpickle(path: Path) -> Any:
    try:
        return _load(path)
    except _DAMAGE as error:
        older = _newest_readable(path)
        remedy = f"use {older}" if older else f"give {_FORMS}"
        raise ModelError(
            f"{_target(path)} is damaged, or holds more than tensors and plain values; {remedy}"
        ) from error


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _target(path: Path) -> Path:
    """The checkpoint of a step that ``last.ckpt`` stands for; any other is its own."""
    stands_for_another = path.name == _LAST.name and path.is_symlink()  # in the Hub's cache all are links
    return path.with_name(path.readlink().name) if stands_for_another else path


def _newest_readable(damaged: Path) -> Path | None:
    """The newest checkpoint of its run that can be read, of the steps before that of a damaged one."""
    name = _target(damaged).name
    steps = sorted(damaged.parent.glob("step-*.ckpt"), reverse=True)
    before = [path for path in steps if path.name < name or not name.startswith("step-")]
    return next((path for path in before if _is_readable(path)), None)


def _is_readable(path: Path) -> bool:
    try:
        return isinstance(_load(path), dict)
    except (OSError, *_DAMAGE):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


class _NoInitialization(TorchFunctionMode):
    """Lets modules be built without drawing weights: on the meta device that would import sympy, seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return (
            kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs)
        )


def _check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    misshapen = [
        f"{name} is {list(weights[name].shape)}, not {list(weight.shape)}"
        for name, weight in expected.items()
        if name in weights and weights[name].shape != weight.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": misshapen,
    }
    if any(problems.values()):
        told = "; ".join(f"{problem}: {_some(names)}" for problem, names in problems.items() if names)
        raise ModelError(f"{path}: the weights are not those of its config; {told}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
