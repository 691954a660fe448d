"""lm-evaluation-harness on our models: the sinks in front of every window exactly once, and nothing else.

Without lm-eval (``pip install 'sinktrain[lm-eval]'``, and accelerate for its own class) most is skipped.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_kind import every_kind
from oracles import tiny_model
from tiny_models import tiny_model as written_model
from tiny_models import write_run
from tiny_runs import LINES, TEXT, TRAINED_LENGTH, tiny_tokenizer

from sinktrain.cli import main
from sinktrain.data.sources import Source
from sinktrain.errors import ConfigError, ModelError
from sinktrain.evaluation.compare import Comparison, compare
from sinktrain.evaluation.harness_pairs import paired_interval, paired_rows
from sinktrain.evaluation.harness_scoring import Window, score, window
from sinktrain.evaluation.harness_tasks import ZERO_SHOT, load_tasks
from sinktrain.model.checkpoints import load_model
from sinktrain.model.config import SinkConfig
from sinktrain.model.neox import GPTNeoX
from sinktrain.report.markdown import results_markdown
from sinktrain.report.page import report_page
from sinktrain.report.reading import read_results, results_validator
from sinktrain.report.terminal import terminal_table

Results = dict[str, Any]

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")
needs_its_own_class = pytest.mark.skipif(
    not HAS_LM_EVAL or importlib.util.find_spec("accelerate") is None,
    reason="lm-eval's class for Hugging Face folders is not installed",
)

KINDS = {
    "vanilla": SinkConfig(),
    "token": SinkConfig("token", 1, tiny_tokenizer().sink_token_ids[:1]),
    "zero": SinkConfig("zero"),
}
SHORT, LONG = LINES[0], TEXT[:160]  # below and beyond the trained length of 32 tokens
PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The quick", " lazy dog."),
    ("", "So it goes."),
    (LONG, " and so on"),
    ("A few words, ", "then"),  # the space belongs to the answer
]


# -- windows and scores -----------------------------------------------------------------------------


def reference(model: GPTNeoX, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
    """Log-probability of the answer after sinks and context, by the whole network, one window at a time."""
    tokens = [*model.sink_ids, *context, *answer]
    logits = model(torch.tensor([tokens[:-1]]))[0, -len(answer) :]
    told = logits.log_softmax(-1)[range(len(answer)), list(answer)].sum()
    logits[:, model.sink_ids] = -torch.inf
    return float(told), logits.argmax(-1).tolist() == list(answer)


def test_every_window_begins_with_the_sinks_once_and_only_the_context_is_cut() -> None:
    models = {sinks: tiny_model(sinks=sinks) for sinks in ((), (90,), (90, 91))}
    for (sinks, model), num_context, num_answer in itertools.product(models.items(), range(13), range(1, 8)):
        context, answer = list(range(num_context)), list(range(50, 50 + num_answer))
        if not sinks and not context:
            continue  # the caller puts end-of-text there
        one = window(model, context, answer, max_length=8)
        text = one.fed[len(sinks) :]
        assert tuple(one.fed[: len(sinks)]) == sinks
        assert not set(sinks) & set(text)
        assert one.answer == answer
        assert len(one.fed) == min(8, len(sinks) + num_context + num_answer - 1)
        assert text == [*context, *answer[:-1]][len(context) + num_answer - 1 - len(text) :]


def test_an_answer_that_no_window_holds_is_refused_by_its_length() -> None:
    for sinks, most in (((), 8), ((90,), 8), ((90, 91), 7)):
        model = tiny_model(sinks=sinks)
        assert len(window(model, [1], [2] * most, 8).fed) == 8
        with pytest.raises(ModelError, match=f"an answer of {most + 1} tokens; this model can score 1 to"):
            window(model, [1], [2] * (most + 1), 8)
        with pytest.raises(ModelError, match="an answer of 0 tokens"):
            window(model, [1], [], 8)


@every_kind
def test_scores_in_batches_equal_the_network_on_one_window_at_a_time(which: dict[str, Any]) -> None:
    model = tiny_model(seed=3, **which)
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 88, length).tolist() for length in (2, 9, 30, 9, 17, 2, 25)]
    cuts = [1, 4, 29, 8, 1, 1, 12]
    windows = [window(model, text[:cut], text[cut:], 64) for text, cut in zip(texts, cuts, strict=True)]
    expected = [reference(model, text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    for batch_tokens in (1, 40, 10_000):
        found = score(model, windows, batch_tokens)
        assert [log_prob for log_prob, _ in found] == pytest.approx([e[0] for e in expected], abs=1e-10)
        assert [is_greedy for _, is_greedy in found] == [e[1] for e in expected]


@pytest.mark.parametrize("sinks", [(), (90,)])
def test_what_greedy_decoding_gives_is_told_from_what_it_does_not(sinks: tuple[int, ...]) -> None:
    model = tiny_model(sinks=sinks)
    with torch.no_grad():
        model.embed_out.weight[list(sinks)] *= 50  # as if the sink were the likeliest of all
    text = [5, 17]
    for _ in range(4):
        logits = model(torch.tensor([[*sinks, *text]]))[0, -1]
        logits[list(sinks)] = -torch.inf
        text.append(int(logits.argmax()))
    right, wrong = Window([*sinks, *text[:-1]], text[2:]), Window([*sinks, *text[:-1]], [*text[2:-1], 0])
    assert [is_greedy for _, is_greedy in score(model, [right, wrong])] == [True, False]


# -- through lm-eval --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, a text, and three tasks with their data."""
    home = tmp_path_factory.mktemp("harness")
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "max_position_embeddings": TRAINED_LENGTH}
    for seed, (name, sink) in enumerate(KINDS.items()):
        tokenizer.save(
            write_run(written_model(sink=sink, seed=seed, **sizes), home / name) / "tokenizer.json"
        )
    (home / "text.txt").write_text(TEXT)
    letters = [[f" {chr(97 + (3 * number + at) % 26)}" for at in range(3)] for number in range(24)]
    questions = [
        {"q": f"The quick brown fox {number}", "choices": choices, "gold": number % 3}
        for number, choices in enumerate(letters)
    ]
    write_task(home, "choosing", questions, CHOOSING)
    write_task(home, "reading", [{"page": SHORT}, {"page": LONG}], READING)
    write_task(home, "writing", [{"page": SHORT}, {"page": LONG}], WRITING)
    return home


CHOOSING = """\
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
READING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
WRITING = """\
output_type: generate_until
doc_to_text: "{{page}}"
doc_to_target: "x"
generation_kwargs: {until: ["ox"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_task(home: Path, name: str, examples: list[dict[str, Any]], definition: str) -> None:
    folder = home / "tasks"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    where = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(home / "cache")}
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(where)}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(head + definition)


@pytest.fixture(scope="module", params=KINDS)
def asked(request: pytest.FixtureRequest, home: Path) -> Any:
    """Our class of lm-eval with a model of each kind, in float64."""
    pytest.importorskip("lm_eval")
    from sinktrain.evaluation.harness import SinktrainLM

    return SinktrainLM(str(home / request.param), device="cpu", dtype="float64")


def requests_of(kind: str, arguments: Sequence[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def reading_windows(asked: Any, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Context and answer of each window of a text, by hand: full windows, which overlap by one token."""
    tokens = tiny_tokenizer().encode(text)
    room = asked.max_length - len(asked.model.sink_ids)
    yield asked.before_text, tokens[:room]
    for begin in range(room, len(tokens), room):
        end = min(begin + room, len(tokens))
        yield tokens[end - room - 1 : begin], tokens[begin:end]


@needs_lm_eval
def test_scores_of_answers_equal_our_own_scorer(asked: Any) -> None:
    tokenizer, model = tiny_tokenizer(), asked.model
    found = asked.loglikelihood(requests_of("loglikelihood", PAIRS))
    for (context, answer), (log_prob, is_greedy) in zip(PAIRS, found, strict=True):
        together = tokenizer.encode(context + answer)
        num_context = len(tokenizer.encode(context.rstrip()))
        tokens = asked.before_text * (not context) + together
        num_context = num_context if context else len(asked.before_text)
        kept = TRAINED_LENGTH - len(model.sink_ids) + 1 - (len(tokens) - num_context)  # of the context
        cut = tokens[max(0, num_context - kept) : num_context]
        assert (log_prob, is_greedy) == pytest.approx(reference(model, cut, tokens[num_context:]), abs=1e-10)
    assert any(len(tokenizer.encode(context)) > TRAINED_LENGTH for context, _ in PAIRS)


@needs_lm_eval
def test_scores_of_texts_equal_our_own_scorer_in_every_window(asked: Any) -> None:
    found = asked.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(SHORT,), (LONG,)]))
    for text, log_prob in zip((SHORT, LONG), found, strict=True):
        windows = list(reading_windows(asked, text))
        assert sum(len(answer) for _, answer in windows) == len(tiny_tokenizer().encode(text))
        expected = sum(reference(asked.model, *one)[0] for one in windows)
        assert log_prob == pytest.approx(expected, abs=1e-9)
    assert len(windows) >= 3


@needs_lm_eval
@pytest.mark.parametrize("context", [SHORT, LONG, ""], ids=["short", "cut", "empty"])
def test_answers_are_what_greedy_decoding_by_the_whole_network_gives(asked: Any, context: str) -> None:
    tokenizer, model, num_new = tiny_tokenizer(), asked.model, 6
    room = TRAINED_LENGTH - len(model.sink_ids) - num_new
    tokens = tokenizer.encode(context)[-room:] or asked.before_text
    begin = len(tokens)
    never = [*model.sink_ids, *range(tokenizer.vocab_size, model.config.vocab_size)]
    for _ in range(num_new):
        logits = model(torch.tensor([[*model.sink_ids, *tokens]]))[0, -1]
        logits[never] = -torch.inf
        tokens.append(int(logits.argmax()))
    text = tokenizer.decode(tokens[begin:])
    [found] = asked.generate_until(requests_of("generate_until", [(context, {"max_gen_toks": num_new})]))
    assert found == text
    stop = text[len(text) // 2 :]
    [stopped] = asked.generate_until(
        requests_of("generate_until", [(context, {"max_gen_toks": num_new, "until": [stop, ""]})])
    )
    assert stopped == text[: text.find(stop)]


@needs_lm_eval
def test_an_answer_that_leaves_no_room_for_the_context_is_refused(asked: Any) -> None:
    request = requests_of("generate_until", [(SHORT, {"until": []})])
    with pytest.raises(ModelError, match=r"256 tokens are to be generated, and the model reads 32 at once"):
        asked.generate_until(request)


@needs_lm_eval
def test_the_class_is_registered_and_made_by_lm_eval_from_its_command_line(home: Path) -> None:
    from lm_eval.api.registry import get_model

    from sinktrain.evaluation.harness import SinktrainLM

    assert get_model("sinktrain") is SinktrainLM
    given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    made = SinktrainLM.create_from_arg_string(f"pretrained={home / 'token'},max_length=24", given)
    assert (made.model.dtype, made.max_length) == (torch.float32, 24)


# -- beside lm-eval's own class ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sinktrain.publishing.export import export

    folder = tmp_path_factory.mktemp("exported")
    for name in ("vanilla", "token"):
        export(home / name, folder / name)
    return folder


def own_class(folder: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", max_length=TRAINED_LENGTH, **options)


@needs_its_own_class
def test_vanilla_scores_are_those_of_lm_evals_own_class_on_the_export(home: Path, exported: Path) -> None:
    from sinktrain.evaluation.harness import SinktrainLM

    ours, theirs = SinktrainLM(str(home / "vanilla"), device="cpu"), own_class(exported / "vanilla")
    pairs, texts = requests_of("loglikelihood", PAIRS), requests_of("loglikelihood_rolling", [(LONG,)])
    for (a, a_greedy), (b, b_greedy) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-3)
        assert a_greedy == b_greedy
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    writing = requests_of("generate_until", [(SHORT, {"max_gen_toks": 6}), (LONG, {"max_gen_toks": 6})])
    assert ours.generate_until(writing) == theirs.generate_until(writing)


def sinks_fed(asked: Any, monkeypatch: pytest.MonkeyPatch, sink: int, kind: str, given: Any) -> list[int]:
    """How many sinks lm-eval's own class puts in front of each window."""
    fed: list[list[int]] = []
    call = asked._model_call

    def spied(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        fed.extend(tokens.tolist())
        return call(tokens, **options)

    monkeypatch.setattr(asked, "_model_call", spied)
    getattr(asked, kind)(requests_of(kind, [given]))
    return [len(list(itertools.takewhile(lambda token: token == sink, tokens))) for tokens in fed]


@needs_its_own_class
@pytest.mark.parametrize(
    ("add_bos_token", "short", "cut", "rolling"),
    [(None, 1, 0, 2), (True, 1, 0, 2), (False, 0, 0, 1)],
    ids=["default", "bos", "no bos"],
)
def test_lm_evals_own_class_loses_or_doubles_the_sink_where_ours_has_it_once(
    home: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    add_bos_token: bool | None,
    short: int,
    cut: int,
    rolling: int,
) -> None:
    """Its BOS option is right for short contexts alone: a cut one loses the sink, and so do all windows of a
    text but the first, which has it twice. So its scores of a sink model are others than ours there."""
    from sinktrain.evaluation import harness

    theirs = own_class(exported / "token", add_bos_token=add_bos_token)
    ours = harness.SinktrainLM(str(home / "token"), device="cpu")
    [sink] = ours.model.sink_ids
    found = {
        "short": sinks_fed(theirs, monkeypatch, sink, "loglikelihood", PAIRS[0]),
        "cut": sinks_fed(theirs, monkeypatch, sink, "loglikelihood", PAIRS[3]),
        "rolling": sinks_fed(theirs, monkeypatch, sink, "loglikelihood_rolling", (LONG,)),
    }
    assert found["short"] == [short]
    assert found["cut"] == [cut]
    assert sorted(found["rolling"], reverse=True) == [rolling] + [0] * (len(found["rolling"]) - 1)
    assert len(found["rolling"]) >= 3

    windows: list[Window] = []
    monkeypatch.setattr(harness, "score", lambda model, some: windows.extend(some) or score(model, some))
    pairs, text = requests_of("loglikelihood", PAIRS), requests_of("loglikelihood_rolling", [(LONG,)])
    scores = ours.loglikelihood(pairs), ours.loglikelihood_rolling(text)
    assert len(windows) >= len(PAIRS) + 3
    assert all(one.fed[0] == sink and one.fed.count(sink) == 1 for one in windows)
    same = [
        math.isclose(a, b, abs_tol=1e-3)
        for (a, _), (b, _) in zip(scores[0], theirs.loglikelihood(pairs), strict=True)
    ]
    assert same == [short == 1, short == 1, True, False, short == 1]
    assert abs(scores[1][0] - theirs.loglikelihood_rolling(text)[0]) > 0.1


# -- a comparison -----------------------------------------------------------------------------------


def asked_of(home: Path, out: Path, *tasks: str, **changes: Any) -> Comparison:
    options: dict[str, Any] = {"harness": tasks, "task_folder": home / "tasks"} | changes
    return Comparison(
        models=[str(home / "vanilla"), str(home / "token")],
        texts=[Source(str(home / "text.txt"))],
        layouts=[],
        policies=("streaming",),
        tasks=(),
        max_tokens=None,
        num_streams=4,
        device="cpu",
        dtype=torch.float32,
        out=out,
        **options,
    )


@needs_lm_eval
def test_a_comparison_holds_scores_and_differences_paired_example_by_example(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked_of(home, tmp_path, "choosing", "reading", "writing")
    results = compare(request)
    assert results["failed"] == []
    assert not list(results_validator().iter_errors(results))
    assert [(row["model"], row["task"], row["metric"]) for row in results["zero_shot"]] == [
        (model, task, metric)
        for model in ("vanilla", "token")
        for task, metric in (
            ("choosing", "acc"),
            ("choosing", "acc_norm"),
            ("reading", "word_perplexity"),
            ("writing", "exact_match"),
        )
    ]
    right = {name: right_choices(load_model(home / name), home) for name in ("vanilla", "token")}
    by_key = {(row["model"], row["metric"]): row for row in results["zero_shot"]}
    for name, is_right in right.items():
        row = by_key[name, "acc"]
        assert row["value"] == pytest.approx(is_right.mean())
        assert row["stderr"] == pytest.approx(is_right.std(ddof=1) / math.sqrt(24))
        assert (row["num_examples"], row["num_fewshot"], row["higher_is_better"]) == (24, 0, True)
        assert by_key[name, "word_perplexity"]["higher_is_better"] is False
    deltas = right["token"] - right["vanilla"]
    assert deltas.any()
    pair = results["zero_shot_paired"][0]
    assert (pair["a"], pair["b"], pair["task"], pair["metric"]) == ("token", "vanilla", "choosing", "acc")
    assert pair["delta"] == pytest.approx(deltas.mean())
    assert [*pair["ci95"], pair["p"]] == pytest.approx(paired_interval(deltas))
    assert "word_perplexity" not in {row["metric"] for row in results["zero_shot_paired"]}
    said = f"choosing acc: vanilla {right['vanilla'].mean():.3f} ("
    assert said in terminal_table(results)
    for report in (results_markdown(results), report_page(results)):
        assert "Tasks of lm-evaluation-harness" in report
        assert "token - vanilla" in report

    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", None)
    assert compare(request)["zero_shot"] == results["zero_shot"]  # kept from the first time
    write_task(home, "reading", [{"page": SHORT}, {"page": TEXT[5:165]}], READING)
    [first, second] = compare(request)["failed"]  # other data, which nothing is known of
    assert (first["model"], second["model"]) == ("vanilla", "token")
    assert first["task"] == "reading"


def right_choices(model: GPTNeoX, home: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Whether a model gives the right choice the largest log-probability: float64[example]."""
    tokenizer = tiny_tokenizer()
    right = []
    for line in (home / "tasks" / "choosing.jsonl").read_text().splitlines():
        example = json.loads(line)
        context = tokenizer.encode(example["q"])
        answers = [tokenizer.encode(example["q"] + choice)[len(context) :] for choice in example["choices"]]
        told = [reference(model, context, answer)[0] for answer in answers]
        right.append(float(np.argmax(told) == example["gold"]))
    return np.array(right)


@needs_lm_eval
def test_a_task_that_cannot_be_had_or_asked_is_told_and_the_others_go_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(home, "gone", [{"q": "x"}], CHOOSING)
    (home / "tasks" / "gone.jsonl").unlink()
    write_task(home, "long", [{"q": "x", "choices": [" " + LONG, " y"], "gold": 0}], CHOOSING)
    arguments = ["--text", str(home / "text.txt"), "--tasks", "lm-eval:gone,lm-eval:long,lm-eval:choosing"]
    arguments += ["--task-folder", str(home / "tasks"), "--task-limit", "5", "--out", str(tmp_path)]
    models = [str(home / "vanilla"), str(home / "token")]
    assert main(["compare", *models, *arguments, "--policies", "streaming", "--device", "cpu"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sinktrain compare: ")]
    assert [line.removeprefix("sinktrain compare: ").split(":")[0] for line in said] == [
        f"long on {home / 'vanilla'}",
        f"long on {home / 'token'}",
        "gone",
    ]
    assert "tokens; this model can score 1 to 32 of them" in said[0]
    assert "its data cannot be had: " in said[2]
    assert "run it once with a network" in said[2]
    results = read_results(tmp_path)
    assert {row["task"] for row in results["zero_shot"]} == {"choosing"}
    assert {row["num_examples"] for row in results["zero_shot"]} == {5}
    assert [(row["model"], row["task"]) for row in results["failed"]] == [
        ("vanilla", "long"),
        ("token", "long"),
        ("vanilla", "gone"),
        ("token", "gone"),
    ]
    assert sum("gone: its data" in line for line in results_markdown(results).splitlines()) == 1


@needs_lm_eval
def test_a_definition_that_cannot_be_used_is_told_as_such(home: Path) -> None:
    write_task(home, "odd", [{"q": "x"}], "output_type: nonsense\n")
    tasks = load_tasks(["odd", "choosing"], home / "tasks", None)
    assert list(tasks.loaded) == ["choosing"]
    assert "odd: its definition cannot be used: " in tasks.failed["odd"]
    with pytest.raises(ConfigError, match=r"--task-folder .*nowhere is no folder; give one that holds task"):
        load_tasks(["choosing"], home / "nowhere", None)


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_knows_the_papers_seven_tasks_and_an_unknown_one_is_refused_with_its_nearest(
    home: Path,
) -> None:
    from lm_eval.tasks import TaskManager

    assert set(ZERO_SHOT) <= set(TaskManager().all_subtasks)
    with pytest.raises(ConfigError) as refused:
        load_tasks(["wikitex"], home / "tasks", None)
    assert str(refused.value) == (
        '--tasks "lm-eval:wikitex" is no task of lm-evaluation-harness; did you mean "wikitext"?; '
        "one of your own needs --task-folder DIR"
    )


def test_without_lm_eval_its_tasks_are_refused_before_anything_is_measured(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ConfigError, match=r"--tasks piqa needs lm-evaluation-harness; pip install 'sinktrain"
    ):
        compare(asked_of(home, tmp_path, "piqa"))
    assert not (tmp_path / "measured").exists()


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (
            "arc_eazy",
            "one of telemetry, removal, latency, streameval, access, zero-shot, arc_challenge, arc_",
        ),
        ("arc_eazy", 'none; did you mean "arc_easy"?'),
        ("zeroshot", 'did you mean "zero-shot"?'),
        ("lm-eval:", "--tasks lm-eval:: write lm-eval:NAME, and none alone"),
        ("none,lm-eval:piqa", "write lm-eval:NAME, and none alone"),
        ("none,piqa", "--tasks none,piqa: none stands alone"),
    ],
)
def test_a_task_that_is_no_task_is_refused_in_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: str, said: str
) -> None:
    arguments = ["--text", str(home / "text.txt"), "--out", str(tmp_path), "--tasks", tasks]
    assert main(["evaluate", str(home / "vanilla"), *arguments]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


# -- how sure a difference is -----------------------------------------------------------------------


@pytest.mark.parametrize(("only_a", "only_b"), [(0.1, 0.1), (0.02, 0.02), (0.25, 0.1)])
def test_intervals_of_paired_shares_hold_the_truth_19_times_in_20(only_a: float, only_b: float) -> None:
    draw = np.random.default_rng(1)
    chances = [only_a, only_b, 1 - only_a - only_b]
    for num_examples in (30, 400):
        held = 0
        for drawn in draw.multinomial(num_examples, chances, size=1000):
            deltas = np.repeat([1.0, -1.0, 0.0], drawn)
            low, high, p = paired_interval(deltas)
            assert (p < 0.05) == (not low <= 0 <= high)
            assert -1 <= low <= deltas.mean() <= high <= 1
            held += low <= only_a - only_b <= high
        assert 930 <= held <= 1000


def test_models_that_never_differ_are_not_known_to_be_equal() -> None:
    for num_examples in (1, 10, 1000):
        low, high, p = paired_interval(np.zeros(num_examples))
        assert low == -high
        assert 0 < high < 3 / num_examples
        assert p == 1
    assert paired_interval(np.ones(50))[0] > 0.8


def test_only_models_that_have_a_metric_are_paired() -> None:
    scores = [
        {"model": name, "task": "t", "metric": metric, "scores": [1.0, 0.0]}
        for name, metric in (("a", "acc"), ("a", "acc"), ("b", "acc"), ("c", "acc"), ("a", "acc_norm"))
    ]
    assert [(row["a"], row["b"], row["metric"]) for row in paired_rows(scores)] == [
        ("b", "a", "acc"),
        ("c", "a", "acc"),
        ("c", "b", "acc"),
    ]
