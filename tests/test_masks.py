"""Training on a window or within documents: it is what streams, and a sink of its own for every document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import random_tokens, tiny_model
from test_fit import measured
from tiny_shards import start as start_run
from tiny_shards import tiny_run
from torch import Tensor

from sinktrain.errors import ConfigError
from sinktrain.model.checkpoints import describe, load_model
from sinktrain.model.masked_attention import Mask, document_ages
from sinktrain.model.neox import GPTNeoX
from sinktrain.model.sinks.base import KINDS
from sinktrain.streaming.blockwise import stream_logits

END = 7
MODELS = [
    pytest.param({"sinks": (90, 91)[:count]} if count else {"kind": kind}, id=f"{kind}{count or ''}")
    for kind in sorted(KINDS)
    for count in ((1, 2) if KINDS[kind].has_tokens else (0,))
]


def sample(model: GPTNeoX) -> Tensor:
    """Two rows of 40 tokens behind the model's sinks; documents of one token are among them."""
    tokens = random_tokens(2, 40)
    tokens[tokens == END] += 1
    tokens[0, [0, 12, 13, 39]] = END
    tokens[1, 20] = END
    return torch.cat((torch.tensor(model.sink_ids, dtype=torch.int64).expand(2, -1), tokens), dim=1)


@pytest.mark.parametrize("which", MODELS)
def test_training_on_a_window_computes_what_streams(which: dict) -> None:
    model = tiny_model(**which)
    tokens, num_sinks = sample(model), len(model.sink_ids)
    streamed = torch.cat(list(stream_logits(model, tokens, num_sinks, window=6)), dim=1)
    dense = model(tokens)
    model.mask = Mask(window=6)
    torch.testing.assert_close(model(tokens), streamed, rtol=0, atol=1e-10)
    model.mask = Mask(window=tokens.shape[1])
    torch.testing.assert_close(model(tokens), dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("which", MODELS)
def test_documents_of_a_sample_are_samples_of_their_own(which: dict, window: int | None) -> None:
    model = tiny_model(**which)
    tokens, num_sinks = sample(model), len(model.sink_ids)
    model.mask = Mask(window, END)
    together = model(tokens)
    model.mask = Mask(window) if window else None
    for row in range(2):
        text = tokens[row, num_sinks:]
        ends = [int(end) + 1 for end in (text == END).nonzero()]
        for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
            if start < end:
                alone = torch.cat((tokens[row, :num_sinks], text[start:end]))[None]
                found = together[row, num_sinks + start : num_sinks + end]
                torch.testing.assert_close(model(alone)[0, num_sinks:], found, rtol=0, atol=1e-10)


def test_ages_count_from_the_sinks_in_front_of_each_document() -> None:
    tokens = torch.tensor([[90, 91, 1, END, 2, 3, END, END, 4]])
    assert document_ages(tokens, 2, END).tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 2]]
    assert document_ages(tokens, 2, None).tolist() == [list(range(9))]


def test_a_run_on_a_window_learns_and_its_checkpoint_is_dense_again(train: Callable[..., Path]) -> None:
    """Its loss is another one than without, which shows that the settings arrive."""
    runs = {
        name: train(name, "--config", "sink", "--trainer.max_steps", "4", *options)
        for name, options in {
            "dense": [],
            "window": ["--model.window", "2"],
            "documents": ["--model.mask_documents", "true", "--model.window", "2"],
        }.items()
    }
    losses = {
        name: (run / "metrics.csv").read_text().splitlines()[4].split(",")[1] for name, run in runs.items()
    }
    assert len(set(losses.values())) == 3  # a token of the text is the one that ends documents
    assert load_model(runs["window"]).mask is None


@pytest.mark.slow  # two processes import lightning one after the other
@pytest.mark.parametrize("kind", [kind for kind in sorted(KINDS) if KINDS[kind](6, 3).null_slot()])
def test_layers_in_shards_learn_on_a_window_what_whole_ones_learn(
    kind: str, shards: Path, tmp_path: Path, train: Callable[..., Path]
) -> None:
    """Three heads on two devices: no device has whole heads of what a kind adds."""
    three_heads = ["--model.network.hidden_size", "48", "--model.network.num_attention_heads", "3"]
    options = [*three_heads, "--model.sink.kind", kind, "--model.window", "8", "--trainer.max_steps", "3"]
    on_two = ["--config", "fsdp", "--trainer.devices", "2"]
    process = start_run(tiny_run(shards, tmp_path / "two", *options, *on_two))
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    whole = measured(train("whole", *options), "val/loss")
    assert measured(tmp_path / "two", "val/loss") == pytest.approx(whole, rel=1e-5)


def test_a_mask_makes_another_arm_which_goes_on_in_no_folder_of_others(train: Callable[..., Path]) -> None:
    """Or a finished run would be taken for that of the mask, and ``compare`` would take them for seeds."""
    window, documents = ["--model.window", "4"], ["--model.mask_documents", "true"]
    dense = train("dense", "--trainer.max_steps", "3")
    for mask, problem in {
        tuple(window): "window None, not 4",
        tuple(documents): "mask_documents False, not True",
    }.items():
        with pytest.raises(ConfigError, match=f"was made with {problem}; choose another --run"):
            train("dense", "--trainer.max_steps", "3", *mask)
    masked = train("masked", "--trainer.max_steps", "3", "--config", "sink", *window, *documents)
    assert [describe(run).arm for run in (dense, masked)] == ["vanilla", "token-window-4-documents"]


def test_a_window_of_nothing_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.window is 0; use 1 or more, or null for all earlier tokens"
    ):
        train("run", "--model.window", "0")
