"""Settings of the Trainer's: ours where Lightning has others, and values that would not do here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import StrategyRegistry

from sinktrain.errors import ConfigError, did_you_mean

TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": -1,  # one endless epoch: the loader never ends, max_steps does
    "max_steps": -1,
    "val_check_interval": 1000,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "logger": False,  # metrics.csv is always written; overlays add others
    "enable_checkpointing": False,  # ours are atomic
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}

UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "precision": (
        lambda value: value not in (None, "bf16-mixed", "bf16", "32-true", "32", 32),  # weights are float32
        "bf16-mixed or 32-true",
    ),
    "accumulate_grad_batches": (lambda value: value != 1, "data.micro_batch, which does the same"),
    "gradient_clip_val": (lambda value: value is not None, "model.clip_norm"),
    "gradient_clip_algorithm": (lambda value: value is not None, "model.clip_norm"),
    "max_steps": (lambda value: value < -1, "1 or more"),
    "max_time": (
        lambda value: isinstance(value, str) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value.strip()),
        "DD:HH:MM:SS, such as 00:11:30:00",
    ),
    "num_nodes": (lambda value: value < 1, "1 or more"),
    "limit_train_batches": (lambda value: value is not None, "trainer.max_steps"),  # would repeat them
    "limit_val_batches": (
        lambda value: value is not None and (value < 0 or (isinstance(value, float) and value > 1)),
        "a number of batches, a share such as 0.5, or 0 for no validation",
    ),
    "overfit_batches": (lambda value: value != 0, "a smaller corpus"),
    "log_every_n_steps": (lambda value: value is not None and value < 1, "1 or more"),
    "val_check_interval": (
        lambda value: not isinstance(value, int) or value < 1,
        "a number of steps, or trainer.limit_val_batches 0 for no validation",
    ),
}
"""Settings of Lightning's that would not do here: which values, and what does."""

ACCELERATORS = ("auto", "cpu", "gpu")
STRATEGIES = ("auto", "ddp")


def check_trainer(settings: dict[str, Any]) -> None:
    """Refuse values that Lightning would refuse in its own words, or take and do something else.

    Args:
        settings: of the Trainer's, by name; an object in place of a name is left to Lightning.

    Raises:
        ConfigError: all that is wrong with them.
    """
    problems = [
        unsupported(name, settings[name])
        for name, (is_bad, _) in UNSUPPORTED.items()
        if name in settings and is_bad(settings[name])
    ]
    problems += _strategy_problems(settings["strategy"])
    problems += _device_problems(settings["accelerator"], settings["devices"])
    if problems:
        raise ConfigError("; ".join(problems))


def unsupported(name: str, value: Any) -> str:
    return f"trainer.{name} {value} is not supported; use {UNSUPPORTED[name][1]}"


def trainer_refusal(error: Exception) -> str:
    """What Lightning says of settings that are left to it, in one line."""
    message = " ".join(str(error).split()).rstrip("!.").replace("`", "")
    is_about_devices = re.search(r"(?i)devices|accelerator|backend|gpu", message)
    return f"trainer: {message}{'; sinktrain doctor shows the devices' if is_about_devices else ''}"


def _strategy_problems(strategy: Any) -> Iterator[str]:
    if not isinstance(strategy, str):
        return
    name = strategy.lower()  # as Lightning does
    if name.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        yield f"trainer.strategy {strategy} is not supported; use ddp, whose processes start anew"
    elif name not in (*STRATEGIES, "single_device") and not (
        name.startswith("ddp_") and name in StrategyRegistry
    ):
        yield (
            f"trainer.strategy {strategy} is not supported; use auto or ddp, or --config fsdp, "
            f"deepspeed-zero1, -zero2 or -zero3{did_you_mean(name, STRATEGIES)}"
        )


def _device_problems(accelerator: Any, devices: Any) -> Iterator[str]:
    if not isinstance(accelerator, str):
        return
    if accelerator not in (*ACCELERATORS, "cuda"):
        hint = did_you_mean(accelerator, ACCELERATORS) if accelerator != "tpu" else ""
        yield f"trainer.accelerator {accelerator} is not supported; use auto, cpu or gpu{hint}"
    elif accelerator in ("gpu", "cuda") and not torch.cuda.device_count():
        yield (
            f"trainer.accelerator {accelerator}: torch finds no GPU here; use --trainer.accelerator cpu "
            "(sinktrain doctor shows the devices)"
        )
    elif not TorchElasticEnvironment.detect():  # its processes are the devices
        num_gpus = 0 if accelerator == "cpu" else torch.cuda.device_count()
        yield from _count_problems(devices, num_gpus)


def _count_problems(devices: Any, num_gpus: int) -> Iterator[str]:
    """Problems of ``trainer.devices`` on that many GPUs, or on the CPU where there are none."""
    if devices == "auto":
        return
    if not num_gpus:
        if not re.fullmatch(r"[1-9]\d*", str(devices)):
            yield f"trainer.devices {devices} is not a number of processes on the CPU; use 1 or more"
    elif not _names_gpus(devices, num_gpus):
        several = f"{num_gpus} GPUs; use 1 to {num_gpus}, -1 for all, or some such as 0,{num_gpus - 1}"
        yield f"trainer.devices {devices}: this machine has {several if num_gpus > 1 else '1 GPU; use 1'}"


def _names_gpus(devices: Any, num_gpus: int) -> bool:
    """Whether Lightning finds these: all (-1), a number of them, or some by their indices."""
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip("[] ").rstrip(",").split(",")
    if isinstance(devices, list):
        names = [str(index).strip() for index in devices]
        are_there = all(name.isdecimal() and int(name) < num_gpus for name in names)
        return are_there and 0 < len(names) == len(set(names))
    return str(devices) == "-1" or (str(devices).isdecimal() and 1 <= int(devices) <= num_gpus)
