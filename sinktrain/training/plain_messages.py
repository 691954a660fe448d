"""What jsonargparse says of settings, in plain words: what was typed, what is wrong, what to type."""

from __future__ import annotations

import ast
import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from sinktrain.errors import ConfigError, did_you_mean
from sinktrain.training.loggers import LOGGER_REMEDY
from sinktrain.training.trainer_settings import UNSUPPORTED, unsupported

HAS_NEW_NAMES = hasattr(LightningArgumentParser, "instantiate")
"""Since jsonargparse 4.49, which warns of the old ones."""


class PlainParser(LightningArgumentParser):
    """Lightning's parser, whose refusals are ``ConfigError``."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_plain_message(message, self)) from ex

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """What Lightning 2.6.6 calls by its old name."""
        instantiate = self.instantiate if HAS_NEW_NAMES else super().instantiate_classes
        return instantiate(cfg, **options)


_UNKNOWN_SETTING = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<inner>[^']+)'"
    r"|[Uu]nrecognized arguments: (?P<argument>\S+)"
)

_BAD_VALUE = re.compile(
    r'Parser key "(?P<name>[^"]+)":.*?'
    r"(?:Expected an? (?P<one>.*)\. Got|Subtypes: \[(?P<several>.*)\] Errors: .*) value: ?(?P<value>.*)"
)

_PLAIN_TYPES = [
    (r"<class 'NoneType'>", "null"),
    (r"<class '([\w.]+)'>", r"\1"),
    (r"typing\.Union\[([^\[\]]*)\]", r"\1"),
    (r"typing\.Literal\[([^\[\]]*)\]", r"\1"),
    (r"\b(?:\w+\.)+(\w+)", r"\1"),
]
"""How Python writes types, and how we do."""

_MISSING_SHARDS = re.compile(r"arguments are required: .*data\.path")


def _plain_message(message: str, parser: LightningArgumentParser) -> str:
    """jsonargparse's message in one line that names the setting, and what was probably meant."""
    text = " ".join(message.split())
    if unknown := _UNKNOWN_SETTING.search(text):
        found = unknown.groupdict()
        name = found["option"] or found["argument"] or f"{found['group']}.{found['inner']}"
        name = name.lstrip("-").partition("=")[0]
        known = [action.dest for action in parser._actions]
        return f'unknown setting "{name}"{did_you_mean(name, known)}'
    if bad := _BAD_VALUE.search(text):
        return _bad_value(bad["name"], bad["one"] or bad["several"], bad["value"])
    if _MISSING_SHARDS.search(text):
        return "data.path is missing; pass --data.path SHARDS, made by sinktrain prepare"
    return text.replace("Parser key ", "setting ")


def _bad_value(name: str, types: str, value: str) -> str:
    group, _, inner = name.partition(".")
    if group == "trainer" and inner in UNSUPPORTED and "Literal" in types:  # some of which we refuse
        return unsupported(inner, value)
    if name == "trainer.logger":
        return f"trainer.logger {value} is not supported; use {LOGGER_REMEDY}"
    if choices := re.fullmatch(r"typing\.Literal(\[[^\[\]]*\])", types):
        known = [str(choice) for choice in ast.literal_eval(choices[1])]
        return f'{name} "{value}" is not one of {", ".join(known)}{did_you_mean(value, known)}'
    for pattern, plain in _PLAIN_TYPES:
        types = re.sub(pattern, plain, types)
    return f'setting "{name}": expected {types}, found {value}'
