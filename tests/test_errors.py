"""The errors' shared words, and the lazy front door."""

import subprocess
import sys

import pytest

import sinktrain
from sinktrain.errors import (
    ConfigError,
    DataError,
    ExportError,
    ModelError,
    SinktrainError,
    StreamError,
    TrainingError,
    did_you_mean,
    first_line,
)


def test_did_you_mean_names_the_nearest_known_word():
    assert did_you_mean("warmup_step", ["warmup_steps", "max_steps"]) == '; did you mean "warmup_steps"?'
    assert did_you_mean("pythia-160", iter(["pythia-14m", "pythia-160m"])) == '; did you mean "pythia-160m"?'


@pytest.mark.parametrize(
    ("typed", "meant"), [("15m", "14m"), ("13m", "14m"), ("16m", "160m"), ("1.5b", "1.4b")]
)
def test_of_sizes_alike_the_one_with_more_figures_in_their_places_is_meant(typed, meant):
    """For 15m it was 31m."""
    sizes = ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b"]
    assert did_you_mean(typed, sizes) == did_you_mean(typed, sizes[::-1]) == f'; did you mean "{meant}"?'


def test_did_you_mean_says_nothing_when_nothing_is_near():
    assert did_you_mean("xyz", ["warmup_steps"]) == ""
    assert did_you_mean("xyz", []) == ""
    assert did_you_mean("", []) == ""


def test_first_line_is_what_an_error_says_or_its_name():
    assert first_line(OSError("\ntoo full\nlong story")) == "too full"
    assert first_line(ConnectionError()) == "ConnectionError"


@pytest.mark.parametrize(
    "child", [ConfigError, DataError, ExportError, ModelError, StreamError, TrainingError]
)
def test_every_mistake_can_be_caught_as_one(child):
    with pytest.raises(sinktrain.SinktrainError):
        raise child("a line")


@pytest.mark.parametrize("module", ["sinktrain", "sinktrain.errors"])
def test_import_loads_no_torch(module):
    heavy = {"torch", "lightning", "transformers", "datasets", "pyarrow", "numpy"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_loaded_when_first_used():
    assert sinktrain.SinktrainError is SinktrainError
    for name in sinktrain.__all__:
        assert getattr(sinktrain, name) is not None
    assert dir(sinktrain) == sorted(sinktrain.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sinktrain' has no attribute 'StreamingDecode'"):
        _ = sinktrain.StreamingDecode
