"""A comparison gives every field of results.json, pairs the same tokens, and is refused before it starts."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FACTS, tiny_model, write_checkpoint, write_run
from tiny_runs import TEXT, tiny_tokenizer, write_text_run
from tiny_shards import write_shards

from sinktrain.data.sources import Source
from sinktrain.data.tokenizer import load_tokenizer, train_tokenizer
from sinktrain.errors import ConfigError, DataError, ModelError, SinktrainError, StreamError
from sinktrain.evaluation import arms as arms_module
from sinktrain.evaluation import compare as compare_module
from sinktrain.evaluation import streameval as streameval_module
from sinktrain.evaluation.compare import TASKS, Comparison, compare
from sinktrain.evaluation.statistics import by_position, mean_interval, paired_difference
from sinktrain.evaluation.texts import TokenizedText
from sinktrain.evaluation.timing import free_bytes
from sinktrain.model.checkpoints import load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.sinks.base import KINDS
from sinktrain.report.findings import verdict_sentences
from sinktrain.report.markdown import results_markdown
from sinktrain.report.page import report_page
from sinktrain.report.reading import results_validator
from sinktrain.report.terminal import terminal_table
from sinktrain.streaming.blockwise import stream_loss
from sinktrain.streaming.layout import Layout

N = 16  # half of the runs' trained length
STREAMS = 4
LAYOUTS = [Layout(sinks, N - sinks) for sinks in (0, 1, 2, 4)]
Results = dict[str, Any]


def schema_problems(results: Results) -> list[str]:
    """What of the published schema is missing or of another type."""
    return [error.message for error in results_validator().iter_errors(results)]


# -- models and texts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compare")
    (home / "text.txt").write_text(TEXT)
    write_text_run(home / "vanilla", seed=1)
    write_text_run(home / "sink", 1, seed=2)
    write_text_run(home / "sinks", 2, seed=3)
    other = train_tokenizer(iter([TEXT.upper()]), 290)
    write_text_run(home / "other words", tokenizer=other)
    return home


def asked(home: Path, *models: str, **changes: Any) -> Comparison:
    request = Comparison(
        models=[str(home / model) for model in models],
        texts=[Source(str(home / "text.txt"))],
        layouts=[],
        policies=("streaming", "dense"),
        tasks=(),
        max_tokens=None,
        num_streams=STREAMS,
        device="cpu",
        dtype=torch.float32,
        out=home / "out",
        command="sinktrain compare it all",
    )
    return replace(request, **changes)


@pytest.fixture(scope="module")
def results(home: Path) -> Results:
    return compare(asked(home, "vanilla", "sink"))


def row_of(results: Results, kind: str, **wanted: Any) -> dict[str, Any]:
    (row,) = (row for row in results[kind] if row | wanted == row)
    return row


def scored_losses(home: Path, model: str, layout: Layout) -> np.ndarray[Any, Any]:
    """The losses from token N on by hand: float64[stream, token]."""
    tokenizer, network = tiny_tokenizer(), load_model(home / model)
    tokens = torch.tensor([*tokenizer.encode(TEXT), tokenizer.eos_token_id])
    length = len(tokens) // STREAMS
    streams = tokens[: STREAMS * length].view(STREAMS, length)
    sinks = torch.tensor([network.sink_ids] * STREAMS, dtype=torch.int64)
    losses = stream_loss(network, torch.cat((sinks, streams), dim=1), layout.sinks, layout.window)
    return losses[:, len(network.sink_ids) + N - 1 :].double().numpy()


# -- every kind of sink -----------------------------------------------------------------------------


def write_kind_run(folder: Path, kind: str, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    sink = SinkConfig(kind, 1, tokenizer.sink_token_ids[: int(KINDS[kind].has_tokens)])
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "max_position_embeddings": 2 * N}
    model = tiny_model(sink=sink, seed=seed, **sizes)
    write_checkpoint(model, folder / "checkpoints" / "last.ckpt", FACTS | {"arm": kind, "seed": seed})
    tokenizer.save(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def of_kinds(home: Path) -> Results:
    """One model of each kind, in float64, under every policy."""
    for kind in sorted(KINDS):
        write_kind_run(home / "kinds" / kind, kind, seed=1)
    request = asked(home / "kinds", *sorted(KINDS), texts=[Source(str(home / "text.txt"))])
    policies = ("streaming", "dense", "recompute")
    return compare(
        replace(
            request,
            policies=policies,
            tasks=("telemetry", "removal"),
            verify_tokens=40,
            recompute_tokens=32,
            dtype=torch.float64,
        )
    )


def test_models_of_every_kind_are_compared_side_by_side(of_kinds: Results) -> None:
    assert schema_problems(of_kinds) == []
    assert of_kinds["failed"] == []
    assert [model["sink"]["kind"] for model in of_kinds["models"]] == sorted(KINDS)
    for kind in KINDS:
        slots = 1 if KINDS[kind].has_tokens else 0
        rows = [row for row in of_kinds["perplexity"] if row["model"] == kind]
        assert {(row["policy"], row["sinks"]) for row in rows} == {
            *(("streaming", layout.sinks) for layout in LAYOUTS),
            ("dense", 0),
            ("recompute", slots),
        }
        removed = row_of(of_kinds, "removal", model=kind, test="removed")
        assert removed["num_tokens"] == 1
        pairs = [pair for pair in of_kinds["paired"] if (pair["a"], pair["b"]) == (kind, kind)]
        assert {pair["b_sinks"] for pair in pairs} == {1}
    with_vanilla = {(pair["a"], pair["b"]) for pair in of_kinds["paired"] if "none" in pair.values()}
    assert len(with_vanilla) == len(KINDS)  # itself included


def test_every_kind_streams_blockwise_as_it_steps(of_kinds: Results) -> None:
    assert [(row["model"], row["sinks"]) for row in of_kinds["verified"]] == [
        (kind, layout.sinks) for kind in sorted(KINDS) for layout in LAYOUTS
    ]
    assert max(row["max_logit_diff"] for row in of_kinds["verified"]) < 1e-10


def test_each_kind_has_the_null_mass_that_it_can_have(of_kinds: Results) -> None:
    for kind, sink in KINDS.items():
        of_layer = sink(32, 2).requires_grad_(False)
        rows = [row for row in of_kinds["sink_attention"] if row["model"] == kind]
        assert {row["weights"] for row in rows} == {"trained", "initial"}
        is_scaled = of_layer.output_scale(torch.zeros(1, 32)) is not None
        has_slot = of_layer.null_slot() is not None
        assert {row["null_mass_is_proxy"] for row in rows} == {is_scaled and not has_slot}
        assert {row["null_mass"] > 0 for row in rows} == {is_scaled or has_slot}
        places = [row["position"] for row in of_kinds["sink_metric"] if row["model"] == kind]
        assert (-1 in places) == has_slot


def test_a_report_names_every_kind_and_keeps_to_three_sentences(of_kinds: Results) -> None:
    for report in (terminal_table(of_kinds), results_markdown(of_kinds), report_page(of_kinds)):
        assert all(kind in report.replace("\\_", "_") for kind in KINDS)
    assert len(verdict_sentences(of_kinds)) <= 3


def test_kinds_are_compared_over_seeds(home: Path) -> None:
    runs = [(kind, seed) for seed in (1, 2) for kind in sorted(KINDS)]
    for kind, seed in runs:
        write_kind_run(home / "seeds" / f"{kind}-{seed}", kind, seed)
    request = asked(home / "seeds", *(f"{kind}-{seed}" for kind, seed in runs), policies=("streaming",))
    found = compare(replace(request, texts=[Source(str(home / "text.txt"))], layouts=LAYOUTS[:2]))
    rows = [pair for pair in found["paired"] if pair["interval"] == "seeds"]
    assert {frozenset((row["a"], row["b"])) for row in rows} == {
        frozenset(pair) for pair in itertools.product(KINDS, repeat=2)
    }
    for kind in KINDS:
        lost = [row for row in rows if row["a"] == row["b"] == kind and row["sinks"] == 0]
        assert [(row["b_sinks"], row["num_seeds"], len(row["deltas"])) for row in lost] == [(1, 2, 2)]


# -- what results.json holds ----------------------------------------------------------------------


def test_results_have_every_field_of_the_interface(results: Results) -> None:
    assert schema_problems(results) == []
    assert schema_problems({**results, "paired": [{"a": 1, "ci95": [], "policy": ""}]})
    assert all(results[name] == [] for name in ("latency", "removal", "streameval", "verified", "failed"))


def test_results_are_json_without_nan_or_rounding(results: Results) -> None:
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    digits = [len(repr(row["loss_nats"])) for row in results["perplexity"]]
    assert max(digits) > 12


def test_models_are_described(results: Results, home: Path) -> None:
    sink_id = tiny_tokenizer().sink_token_ids[0]
    parameters = sum(parameter.numel() for parameter in load_model(home / "sink").parameters())
    assert results["models"] == [
        {
            "name": name,
            "source": str(home / name),
            "parameters": parameters,
            "sink": sink,
            "sink_about": KINDS[str(sink["kind"])].about,
            "tokens_seen": 6400,
            "seed": 7,
            "arm": "sink",
            "tokenizer": tiny_tokenizer().sha256,
            "trained_length": 2 * N,
        }
        for name, sink in (
            ("vanilla", {"kind": "none", "count": 0, "token_ids": []}),
            ("sink", {"kind": "token", "count": 1, "token_ids": [sink_id]}),
        )
    ]


def test_default_layouts_are_those_of_the_paper_at_half_the_trained_length(results: Results) -> None:
    found = [(row["model"], row["policy"], row["sinks"], row["window"]) for row in results["perplexity"]]
    stream_len = row_of(results, "perplexity", model="vanilla", policy="dense")["window"]
    assert found == [
        (model, *row)
        for model, num_sinks in (("vanilla", 0), ("sink", 1))
        for row in (
            *(("streaming", layout.sinks, layout.window) for layout in LAYOUTS),
            ("dense", 0, stream_len + num_sinks),
        )
    ]


def test_default_layouts_fit_the_model_of_the_shortest_length(home: Path, tmp_path: Path) -> None:
    long = write_text_run(tmp_path / "long", max_position_embeddings=64)
    found = compare(replace(asked(home, "vanilla"), models=[str(long), str(home / "vanilla")]))
    assert {row["sinks"] + row["window"] for row in found["paired"] if row["policy"] == "streaming"} == {N}


def test_every_row_scores_as_many_tokens(results: Results) -> None:
    num_tokens = len(tiny_tokenizer().encode(TEXT)) + 1
    expected = STREAMS * (num_tokens // STREAMS - N)
    assert {row["tokens_scored"] for row in results["perplexity"]} == {expected}
    assert {row["text"] for kind in ("perplexity", "paired") for row in results[kind]} == {"text.txt"}


def test_documents_are_those_that_the_scored_tokens_come_from(home: Path, tmp_path: Path) -> None:
    line = "to be or not to be that is the question " * 4
    path = tmp_path / "three.txt"
    path.write_text("<|doc|>\n".join(f"{line}\n" for _ in range(3)))
    num_tokens = len(tiny_tokenizer().encode(path.read_text().replace("<|doc|>\n", ""))) + 3
    rows = compare(replace(asked(home, "vanilla"), texts=[Source(str(path))], num_streams=1))["perplexity"]
    assert {row["documents_scored"] for row in rows} == {3}
    assert num_tokens > 3 * N
    fewer = compare(
        replace(asked(home, "vanilla"), texts=[Source(str(path))], num_streams=1, max_tokens=num_tokens // 2)
    )
    assert {row["documents_scored"] for row in fewer["perplexity"]} == {2}


def test_a_document_counts_if_one_token_of_it_is_scored_wherever_its_end_is() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokens = np.array([[7, 7, end, 7], [end, end, 7, 7], [7, 7, end, end]])
    #       documents:  0  0   0   1     1    2   3  3    3  3   3    4
    text = TokenizedText(tokens.ravel(), tokenizer)
    last_two = np.arange(4) >= np.full((3, 1), 2)
    assert text.num_documents(tokens, last_two) == 4  # all but 2
    assert text.num_documents(tokens, np.ones_like(last_two)) == 5


@pytest.mark.parametrize("model", ["vanilla", "sink"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_perplexity_and_interval_equal_those_by_hand(
    results: Results, home: Path, model: str, layout: Layout
) -> None:
    row = row_of(results, "perplexity", model=model, sinks=layout.sinks, policy="streaming")
    losses = scored_losses(home, model, layout)
    assert row["tokens_scored"] == losses.size
    assert row["loss_nats"] == pytest.approx(losses.mean(), rel=1e-12)
    assert row["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-12)
    assert row["ci95"][0] < row["loss_nats"] < row["ci95"][1]
    unscored = np.full((len(losses), N), np.nan)
    interval = mean_interval(np.concatenate((unscored, losses), axis=1))
    assert row["ci95"] == [interval.low, interval.high]


def test_bits_per_byte_equal_those_by_hand(results: Results, home: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode(TEXT)
    length = (len(tokens) + 1) // STREAMS
    starts = range(0, STREAMS * length, length)
    num_bytes = sum(len(tokenizer.decode(tokens[start + N : start + length])) for start in starts)
    losses = scored_losses(home, "sink", LAYOUTS[1])
    row = row_of(results, "perplexity", model="sink", sinks=1)
    assert row["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / num_bytes, rel=1e-12)


def test_loss_by_position_counts_the_sinks_in_front(results: Results, home: Path) -> None:
    for model, num_sinks in (("vanilla", 0), ("sink", 1)):
        row = row_of(results, "position_loss", model=model, sinks=0, policy="streaming")
        assert row["stream_pos"][0] >= num_sinks + 1
        assert row["stream_pos"] == sorted(row["stream_pos"])
        assert row["stream_pos"][-1] <= num_sinks + (len(tiny_tokenizer().encode(TEXT)) + 1) // STREAMS - 1
    losses = scored_losses(home, "sink", LAYOUTS[0])
    stream_pos = np.arange(losses.shape[1]) + N + 1
    assert by_position(losses, stream_pos)[1].mean() == pytest.approx(losses.mean(), rel=0.02)


def test_differences_are_later_minus_earlier_model_on_the_same_tokens(results: Results, home: Path) -> None:
    between = [row for row in results["paired"] if row["a"] != row["b"] and "a_sinks" not in row]
    assert [(row["a"], row["b"], row["policy"], row["sinks"]) for row in between] == [
        *(("sink", "vanilla", "streaming", layout.sinks) for layout in LAYOUTS),
        ("sink", "vanilla", "dense", 0),
    ]
    for row, layout in zip(between, LAYOUTS, strict=False):
        a, b = (scored_losses(home, model, layout) for model in ("sink", "vanilla"))
        assert row["delta_nats"] == pytest.approx((a - b).mean(), abs=1e-12)
        padded = [np.pad(losses, ((0, 0), (N, 0)), constant_values=np.nan) for losses in (a, b)]
        expected = paired_difference(padded[0], padded[1])
        assert (row["ci95"], row["p"]) == ([expected.low, expected.high], expected.p)
        assert row["interval"] == "text"


def test_models_are_paired_in_their_usual_layouts_too(results: Results, home: Path) -> None:
    [row] = [row for row in results["paired"] if row["a"] != row["b"] and "a_sinks" in row]
    assert (row["a"], row["a_sinks"], row["a_window"]) == ("sink", 1, N - 1)
    assert (row["b"], row["b_sinks"], row["b_window"]) == ("vanilla", 4, N - 4)
    a, b = scored_losses(home, "sink", LAYOUTS[1]), scored_losses(home, "vanilla", LAYOUTS[3])
    assert row["delta_nats"] == pytest.approx((a - b).mean(), abs=1e-12)


def test_each_model_is_paired_with_itself_at_its_own_number_of_sinks(home: Path) -> None:
    found = compare(asked(home, "vanilla", "sink", "sinks", policies=("streaming",)))
    within = [row for row in found["paired"] if row["a"] == row["b"]]
    assert [(row["a"], row["a_sinks"], row["b_sinks"], row["sinks"]) for row in within] == [
        (model, sinks, reference, sinks)
        for model, reference in (("vanilla", 1), ("sink", 1), ("sinks", 2))
        for sinks in (0, 1, 2, 4)
        if sinks != reference
    ]
    for row in within:
        losses = {
            sinks: row_of(found, "perplexity", model=row["a"], sinks=sinks)["loss_nats"]
            for sinks in (0, 1, 2, 4)
        }
        assert row["delta_nats"] == pytest.approx(losses[row["a_sinks"]] - losses[row["b_sinks"]], abs=1e-12)
        assert row["a_sinks"] + row["a_window"] == row["b_sinks"] + row["b_window"] == N


def test_identical_models_do_not_differ(home: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(home / "sink", tmp_path / "twin"))
    found = compare(replace(asked(home, "sink"), models=[str(home / "sink"), str(twin)]))
    between = [row for row in found["paired"] if row["a"] != row["b"]]
    assert len(between) == 5
    for row in between:
        assert (row["delta_nats"], row["ci95"], row["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_the_same_comparison_twice_is_the_same_but_for_the_time(results: Results, home: Path) -> None:
    again = compare(asked(home, "vanilla", "sink", out=home / "elsewhere"))
    for found in (results, again):
        found["environment"] = {**found["environment"], "started_at": "now", "elapsed_s": 1.0}
    assert again == results


def test_models_keep_the_order_in_which_they_were_given(home: Path, results: Results) -> None:
    reversed_results = compare(asked(home, "sink", "vanilla"))
    assert [model["name"] for model in reversed_results["models"]] == ["sink", "vanilla"]
    pair, opposite = (
        next(row for row in found["paired"] if (row["a"], row["b"], row["sinks"]) == (a, b, 1))
        for found, a, b in (
            (results, "sink", "vanilla"),
            (reversed_results, "vanilla", "sink"),
        )
    )
    assert pair["delta_nats"] == -opposite["delta_nats"]


def test_models_of_different_tokenizers_are_measured_but_not_paired(home: Path) -> None:
    found = compare(asked(home, "vanilla", "other words"))
    assert schema_problems(found) == []
    assert {row["model"] for row in found["perplexity"]} == {"vanilla", "other words"}
    assert all(row["bits_per_byte"] > 0 for row in found["perplexity"])
    assert found["paired"]
    assert all(row["a"] == row["b"] for row in found["paired"])


def test_float64_is_measured_in_float64(home: Path, results: Results) -> None:
    found = compare(asked(home, "vanilla", "sink", dtype=torch.float64))
    for row, double in zip(results["perplexity"], found["perplexity"], strict=True):
        assert 0 < abs(row["loss_nats"] - double["loss_nats"]) < 1e-5
    assert found["environment"]["dtype"] == "float64"


def test_repeated_layouts_are_measured_once(home: Path) -> None:
    found = compare(
        asked(home, "sink", layouts=[LAYOUTS[1], LAYOUTS[0], LAYOUTS[1]], policies=("streaming",))
    )
    assert [(row["sinks"], row["window"]) for row in found["perplexity"]] == [(1, N - 1), (0, N)]
    assert len(found["paired"]) == 1


def test_layouts_of_different_sizes_score_from_the_largest_on(home: Path) -> None:
    layouts = [Layout(1, 3), Layout(1, 23)]
    found = compare(asked(home, "sink", layouts=layouts, policies=("streaming",), num_streams=1))
    num_tokens = len(tiny_tokenizer().encode(TEXT)) + 1
    assert [row["tokens_scored"] for row in found["perplexity"]] == [num_tokens - 24] * 2


def test_a_text_in_the_folder_where_one_stands_has_a_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letters").mkdir()
    shutil.copy(home / "text.txt", tmp_path / "letters" / "one.txt")
    monkeypatch.chdir(tmp_path / "letters")
    found = compare(asked(home, "sink", texts=[Source(".")], policies=("streaming",)))
    assert {row["text"] for row in found["perplexity"]} == {"letters"}


# -- names ----------------------------------------------------------------------------------------


def test_models_of_one_folder_name_get_distinct_names(home: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(home / "sink", tmp_path / "sink"))
    sources = [str(home / "sink"), str(twin)]
    found = compare(replace(asked(home), models=sources, policies=("streaming",)))
    assert [model["name"] for model in found["models"]] == sources
    assert {row["a"] for row in found["paired"]} == set(sources)


@pytest.mark.parametrize(
    "other_way", [lambda path: path, lambda path: f"{path}/", lambda path: f"{path}/../sink"]
)
def test_a_model_named_twice_is_refused(home: Path, other_way: Callable[[str], str]) -> None:
    path = str(home / "sink")
    with pytest.raises(ConfigError, match=r"^.*sink.* is named twice; name each model once$"):
        compare(replace(asked(home), models=[path, other_way(path)]))


def test_a_run_and_its_checkpoint_are_the_same_model(home: Path) -> None:
    forms = [home / "sink", home / "sink" / "checkpoints" / "last.ckpt"]
    found = compare(replace(asked(home), models=[str(form) for form in forms], policies=("streaming",)))
    assert [model["name"] for model in found["models"]] == ["sink", "sink/last"]
    between = [row for row in found["paired"] if row["a"] != row["b"]]
    assert [row["delta_nats"] for row in between] == [0.0] * len(LAYOUTS)


# -- shards ---------------------------------------------------------------------------------------


def test_models_without_a_tokenizer_are_compared_on_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    bare = [
        write_run(
            tiny_model(vocab_size=384, max_position_embeddings=32, seed=seed), tmp_path / f"bare {seed}"
        )
        for seed in (1, 2)
    ]
    request = replace(
        asked(tmp_path), models=[str(run) for run in bare], texts=[Source(str(tmp_path / "shards"))]
    )
    found = compare(request)
    assert schema_problems(found) == []
    assert {row["text"] for row in found["perplexity"]} == {"shards"}
    assert any(row["a"] != row["b"] for row in found["paired"])
    assert all(row["bits_per_byte"] > 0 for row in found["perplexity"])


# -- refused, before anything is measured ---------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring is a failure: the mistake of the second model must be found before the first is measured."""
    monkeypatch.setattr(compare_module, "measure_arm", lambda *_: pytest.fail("a model was measured"))


def refused(request: Comparison) -> str:
    with pytest.raises(SinktrainError) as caught:
        compare(request)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("unmeasured")
def test_a_layout_beyond_the_positions_of_any_model_is_refused(home: Path, tmp_path: Path) -> None:
    long = write_text_run(tmp_path / "long", max_position_embeddings=64)
    request = replace(asked(home), models=[str(long), str(home / "sink")], layouts=[Layout(1, 40)])
    with pytest.raises(StreamError):
        compare(request)
    assert refused(request) == (
        "layout 1+40 needs 41 positions but the model was trained on 32; use at most 1+31"
    )


@pytest.mark.usefixtures("unmeasured")
def test_a_second_model_without_a_tokenizer_is_refused(home: Path, tmp_path: Path) -> None:
    bare = write_run(tiny_model(), tmp_path / "bare")
    message = refused(replace(asked(home), models=[str(home / "sink"), str(bare)]))
    assert message.startswith(f"{bare} has no tokenizer; put the tokenizer.json of its training into")


@pytest.mark.usefixtures("unmeasured")
def test_a_second_model_of_another_tokenizer_is_refused_for_shards(home: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    right = write_text_run(tmp_path / "right", tokenizer=load_tokenizer(str(tmp_path / "shards")))
    models = [str(right), str(home / "sink")]
    message = refused(replace(asked(home), models=models, texts=[Source(str(tmp_path / "shards"))]))
    assert "these shards were not made with the tokenizer of" in message


@pytest.mark.usefixtures("unmeasured")
def test_a_text_too_short_for_the_layouts_is_refused(home: Path) -> None:
    message = refused(asked(home, "sink", max_tokens=10))
    assert message.startswith("there are 10 tokens of text and scoring starts after 16; use a longer text")


def test_a_text_too_short_for_an_interval_is_refused(home: Path) -> None:
    with pytest.raises(
        DataError, match=r"^only 4 tokens to score, too few for an interval; use a longer text"
    ):
        compare(asked(home, "sink", max_tokens=20))


@pytest.mark.usefixtures("unmeasured")
def test_a_missing_model_is_refused(home: Path) -> None:
    assert 'does not exist; did you mean "sink"?' in refused(asked(home, "vanilla", "snk"))


def test_losses_that_are_not_finite_are_refused_with_the_model_named(home: Path, tmp_path: Path) -> None:
    """They counted as not scored: the complaint was of a short text."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.padded_vocab_size, max_position_embeddings=32)
    model.embed_out.weight[3, 3] = torch.nan
    path = write_run(model, tmp_path / "diverged")
    tokenizer.save(path / "tokenizer.json")
    with pytest.raises(
        ModelError, match=rf"^{path} gives losses that are not finite: its weights are damaged"
    ):
        compare(replace(asked(home), models=[str(path)]))


# -- memory ---------------------------------------------------------------------------------------


def test_dense_is_left_out_where_it_does_not_fit(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arms_module, "free_bytes", lambda _: 2**17)
    found = compare(asked(home, "sink"))
    assert {row["policy"] for row in found["perplexity"]} == {"streaming"}
    assert schema_problems(found) == []
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    length = (len(tiny_tokenizer().encode(TEXT)) + 1) // STREAMS + 1
    assert said == [
        f"sink: dense left out: 4 streams of {length} tokens need 0.0 GiB of 0.0; "
        "use a smaller --max-tokens to see it"
    ]


def test_nothing_is_said_of_dense_where_it_was_not_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arms_module, "free_bytes", lambda _: 2**17)
    compare(asked(home, "sink", policies=("streaming",)))
    assert "dense" not in capsys.readouterr().err


def test_dense_alone_that_does_not_fit_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms_module, "free_bytes", lambda _: 2**17)
    message = refused(asked(home, "sink", policies=("dense",)))
    assert message.startswith("sink: dense does not fit: 4 streams of")


def test_free_memory_is_what_the_machine_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    monkeypatch.setattr(Path, "read_text", _missing)
    assert free_bytes(torch.device("cpu")) > 2**50  # not Linux


def _missing(*_: Any, **__: Any) -> str:
    raise FileNotFoundError


# -- several texts, several lengths, other policies -----------------------------------------------


@pytest.fixture(scope="module")
def second_text(home: Path) -> Source:
    (home / "second.txt").write_text("".join(reversed(TEXT)))
    return Source(str(home / "second.txt"))


def test_every_text_has_its_own_rows_and_pairs(home: Path, second_text: Source, results: Results) -> None:
    texts = [Source(str(home / "text.txt")), second_text]
    found = compare(asked(home, "vanilla", "sink", texts=texts))
    assert found["environment"]["texts"] == ["text.txt", "second.txt"]
    for kind in ("perplexity", "paired", "position_loss"):
        assert [row for row in found[kind] if row["text"] == "text.txt"] == results[kind]
        assert len([row for row in found[kind] if row["text"] == "second.txt"]) == len(results[kind])


def test_a_text_given_twice_is_refused(home: Path) -> None:
    text = Source(str(home / "text.txt"))
    assert refused(asked(home, "sink", texts=[text, text])) == (
        f"{home / 'text.txt'} is given twice; give each --text once"
    )


def test_texts_of_one_name_are_told_apart_by_their_paths(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "text.txt", tmp_path / "text.txt")
    texts = [Source(str(folder / "text.txt")) for folder in (home, tmp_path)]
    found = compare(asked(home, "sink", texts=texts, policies=("streaming",)))
    assert found["environment"]["texts"] == [text.location for text in texts]


def test_layouts_are_paired_with_the_one_of_their_own_length(home: Path) -> None:
    layouts = [Layout(sinks, size - sinks) for size in (N, N // 2) for sinks in (0, 1)]
    found = compare(asked(home, "sink", layouts=layouts, policies=("streaming",)))
    assert [(row["a_window"], row["b_window"]) for row in found["paired"]] == [(N, N - 1), (8, 7)]


def test_recomputed_rows_are_paired_with_streaming_on_the_tokens_that_both_score(home: Path) -> None:
    policies = ("streaming", "recompute")
    found = compare(asked(home, "vanilla", "sink", policies=policies, recompute_tokens=64))
    assert schema_problems(found) == []
    rows = [row for row in found["perplexity"] if row["policy"] == "recompute"]
    assert [(row["model"], row["sinks"], row["window"]) for row in rows] == [
        ("vanilla", 0, N),
        ("sink", 1, N - 1),
    ]
    assert {row["tokens_scored"] for row in rows} == {64}
    pairs = [row for row in found["paired"] if row.get("a_policy")]
    assert [(row["a"], row["a_policy"], row["b_policy"], row["b_sinks"]) for row in pairs] == [
        ("vanilla", "recompute", "streaming", 1),
        ("sink", "recompute", "streaming", 1),
    ]
    between = [row for row in found["paired"] if row["a"] != row["b"] and row["policy"] == "recompute"]
    assert [row["delta_nats"] for row in between] == [
        pytest.approx(rows[1]["loss_nats"] - rows[0]["loss_nats"], abs=1e-12)
    ]


# -- tasks ----------------------------------------------------------------------------------------


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUM_QUERIES", "FEWER_QUERIES"):
        monkeypatch.setattr(streameval_module, name, 10)


@pytest.mark.usefixtures("few_questions")
def test_all_tasks_fill_their_lists_and_fit_the_schema(home: Path) -> None:
    found = compare(asked(home, "vanilla", "sink", tasks=TASKS, verify_tokens=40))
    assert schema_problems(found) == []
    for name in ("latency", "sink_metric", "sink_attention", "norms", "removal", "streameval", "verified"):
        assert {row["model"] for row in found[name]} == {"vanilla", "sink"}, name
    assert {row["task"] for row in found["streameval"]} == {"streameval", "access"}
    assert {row["test"] for row in found["removal"]} == {"removed", "replaced"}
    assert {row["weights"] for row in found["norms"]} == {"trained", "initial"}
    assert [str(Layout(row["sinks"], row["window"])) for row in found["verified"]] == 2 * [*map(str, LAYOUTS)]
    assert 0 < max(row["max_logit_diff"] for row in found["verified"]) < 1e-5


@pytest.mark.usefixtures("few_questions")
@pytest.mark.parametrize("task", ["streameval", "access"])
def test_questions_are_asked_one_by_one_when_one_task_is_named(home: Path, task: str) -> None:
    found = compare(asked(home, "sink", policies=("streaming",), tasks=(task,)))
    assert {row["task"] for row in found["streameval"]} == {task}


# -- going on -------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(home, "vanilla", "sink", tasks=("telemetry", "removal"), out=tmp_path)
    first = compare(request)
    for name in ("measure", "telemetry", "removal_rows"):
        monkeypatch.setattr(arms_module, name, lambda *_: pytest.fail("measured again"))
    again = compare(request)
    assert all(again[name] == first[name] for name in first if name != "environment")


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float64}, {"num_streams": 3}, {"max_tokens": 300}], ids=str
)
def test_what_depends_on_something_else_is_measured_again(
    home: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    request = asked(home, "sink", policies=("streaming",), out=tmp_path)
    first = compare(request)
    other = compare(replace(request, **changes))
    assert other["perplexity"] == compare(replace(request, **changes, out=tmp_path / "fresh"))["perplexity"]
    assert other["perplexity"] != first["perplexity"]


def test_a_damaged_measurement_is_made_again(home: Path, tmp_path: Path) -> None:
    request = asked(home, "sink", tasks=("telemetry",), out=tmp_path)
    first = compare(request)
    for path in (tmp_path / "measured").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    again = compare(request)
    assert all(again[name] == first[name] for name in first if name != "environment")


def test_a_model_that_fails_half_way_leaves_the_others_results(home: Path, tmp_path: Path) -> None:
    """And the same comparison goes on when the model has been mended."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.padded_vocab_size, max_position_embeddings=32)
    whole = write_run(model, tmp_path / "mended")
    model.embed_out.weight[3, 3] = torch.nan
    broken = write_run(model, tmp_path / "broken")
    for path in (whole, broken):
        tokenizer.save(path / "tokenizer.json")
    request = replace(asked(home), models=[str(broken), str(home / "sink")], out=tmp_path / "out")
    found = compare(request)
    assert schema_problems(found) == []
    assert [row["model"] for row in found["failed"]] == ["broken"]
    assert found["failed"][0]["error"].startswith(f"{broken} gives losses that are not finite")
    assert {row["model"] for row in found["perplexity"]} == {"sink"}
    shutil.rmtree(broken)
    whole.rename(broken)
    found = compare(request)
    assert found["failed"] == []
    assert {row["model"] for row in found["perplexity"]} == {"broken", "sink"}


def test_a_model_that_runs_out_of_memory_is_told_what_would_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_arm(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(compare_module, "measure_arm", measure_arm)
    assert refused(asked(home, "sink")) == (
        f"{home / 'sink'} does not fit into the memory of cpu: CUDA out of memory. Tried to allocate 3 GiB.; "
        "use fewer --streams, smaller --layouts or another --device"
    )
