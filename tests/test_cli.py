"""Commands as users type them: what they print and leave, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from example_results import example_results
from tiny_models import tiny_model, write_run
from tiny_runs import TEXT, tiny_tokenizer, write_text_run
from tiny_shards import write_shards

from sinktrain import __version__, cli
from sinktrain.data.prepare import PrepareOptions
from sinktrain.data.sources import Source
from sinktrain.errors import ConfigError
from sinktrain.evaluation import compare as comparing
from sinktrain.evaluation.compare import Comparison
from sinktrain.model.checkpoints import load_model
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.text import Dialogue, stream_text

SINKTRAIN = str(Path(sys.executable).with_name("sinktrain"))
PROGRESS = re.compile(r"\s*|.*\d\d:\d\d.*")


class Said(NamedTuple):
    code: Any
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*arguments: str | Path) -> Said:
        capsys.readouterr()
        try:
            code: Any = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse, after --help
            code = stopped.code
        return Said(code, *capsys.readouterr())

    return run_command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts and shards, good and bad; commands may not change what is here."""
    home = tmp_path_factory.mktemp("cli")
    (home / "text.txt").write_text(TEXT)
    (home / "short.txt").write_text("So it goes.")
    (home / "empty.txt").write_text("")
    (home / "blank.txt").write_text(" \n\n ")
    (home / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (home / "rows.jsonl").write_text('{"body": "So it goes."}\n')
    (home / "notes").mkdir()
    (home / "notes" / "notes.md").write_text("mine")
    write_text_run(home / "vanilla", seed=1)
    write_text_run(home / "sink", 1, seed=2)
    write_run(tiny_model(), home / "bare")
    write_text_run(home / "small", vocab_size=97)
    write_text_run(home / "damaged")
    last = home / "damaged" / "checkpoints" / "last.ckpt"
    (last.parent / "step-00000010.ckpt").write_bytes(last.read_bytes())
    (last.parent / "step-00000020.ckpt").write_bytes(last.read_bytes()[:-1000])
    last.unlink()
    last.symlink_to("step-00000020.ckpt")
    write_shards(home / "shards")
    for name in ("truncated", "edited"):
        shutil.copytree(home / "shards", home / name)
    shard = home / "truncated" / "tokens-val-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    shard = home / "edited" / "tokens-val-00000.bin"
    shard.write_bytes(b"\x07\x00" + shard.read_bytes()[2:])
    return home


def from_json(said: Said) -> Any:
    """What ``--json`` printed: one value, indented as in the files that commands write."""
    value = json.loads(said.out)
    assert said.out == json.dumps(value, indent=2) + "\n"
    return value


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


# -- without a command ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command_and_has_an_example(run: Run, arguments: list[str]) -> None:
    said = run(*arguments)
    assert said.code == 0
    assert not said.err
    assert "example:" in said.out
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} ", said.out, re.MULTILINE)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_has_an_example(run: Run, command: str) -> None:
    said = run(command, "--help")
    assert said.code == 0
    assert not said.err
    assert said.out.startswith(f"usage: sinktrain {command} ")
    assert f"sinktrain {command} " in said.out.partition("example:\n")[2]


def test_help_of_fit_is_the_same_behind_a_config(run: Run) -> None:
    assert run("fit", "--config", "quickstart", "--help") == run("fit", "--help")


def test_help_and_version_import_no_torch() -> None:
    script = (
        "import sys; from sinktrain.cli import main\n"
        "assert main(['--help']) == main(['--version']) == main(['strem']) - 2 == 0\n"
        "assert not {'torch', 'transformers', 'lightning', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"sinktrain {__version__}\n", "")


def interrupted(*_: Any) -> int:
    raise KeyboardInterrupt


def test_interruption_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinktrain.cli.compare.compare", interrupted)
    assert run("compare") == (130, "", "")


def test_a_defect_is_not_taken_for_a_mistake(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(_: list[str]) -> int:
        raise OSError("nobody knows where")

    monkeypatch.setattr("sinktrain.cli.compare.compare", defective)
    with pytest.raises(OSError, match="nobody knows where"):
        run("compare")


# -- mistakes -------------------------------------------------------------------------------------

OLDER = (
    "{home}/damaged/checkpoints/step-00000020.ckpt is damaged, or holds more than tensors and plain values; "
    "use {home}/damaged/checkpoints/step-00000010.ckpt"
)
STREAM = "stream {home}/sink --max-tokens 3"
COMPARE = "compare {home}/vanilla {home}/sink --out {home}/new"

MISTAKES = [
    ("strem", 'no command "strem"; did you mean "stream"?; see sinktrain --help'),
    ("--verbose stream", 'no option "--verbose" before the command; see sinktrain --help'),
    # prepare
    ("prepare", "say what to prepare and where to: sinktrain prepare TEXT --out DIR"),
    ("prepare {home}/text.txt", "say what to prepare and where to"),
    ("prepare {home}/txt.txt --out {home}/new", 'no such file or folder; did you mean "text.txt"?'),
    ("prepare {home}/empty.txt --out {home}/new", "empty.txt: the file is empty"),
    ("prepare {home}/blank.txt --out {home}/new", "holds no usable document"),
    ("prepare {home}/latin.txt --out {home}/new", "latin.txt: not UTF-8 at byte 2"),
    (
        "prepare {home}/rows.jsonl --out {home}/new",
        'no column "text"; there is "body"; choose one with --text-column',
    ),
    ("prepare {home}/rows.jsonl --text-column bdy --out {home}/new", 'no column "bdy"; did you mean "body"?'),
    ("prepare {home}/notes --out {home}/new", "the folder holds no text"),
    ("prepare {home}/text.txt --out {home}/notes", "--out {home}/notes: holds something else"),
    ("prepare {home}/text.txt --out {home}/new --vocab-size 20", "--vocab-size 20 is too small"),
    (
        "prepare {home}/text.txt --out {home}/new --vocab-size many",
        "argument --vocab-size: invalid int value",
    ),
    ("prepare {home}/text.txt --out {home}/new --tokenizer {home}/none", "none: no such tokenizer"),
    (
        "prepare {home}/text.txt --out {home}/new --max-tokens 0",
        "0 is not a number of tokens; use 1 or more, or inf",
    ),
    (
        "prepare {home}/text.txt --out {home}/new --worker 2",
        'arguments: --worker 2; did you mean "--workers"?',
    ),
    ("prepare {home}/text.txt --out {home}/new --streameval-share 0.7", "--streameval-share 0.7"),
    ("prepare {home}/text.txt --out {home}/new --streameval-share -0.1", "--streameval-share -0.1"),
    ("prepare {home}/text.txt --out {home}/new --streameval-share nan", "--streameval-share nan"),
    ("prepare --verify {home}/notes", "notes: no prepared shards here"),
    ("prepare --verify {home}/truncated", "the shard has 998 bytes, not 1000"),
    ("prepare --verify {home}/edited", "tokens-val-00000.bin: the shard was edited"),
    # stream
    ("stream", "the following arguments are required: MODEL; see sinktrain stream --help"),
    ("stream {home}/snk", '{home}/snk does not exist; did you mean "sink"?'),
    ("stream {home}/notes", "notes holds no model"),
    ("stream {home}/damaged", OLDER),
    ("stream {home}/text.txt", "text.txt is a file of another kind"),
    (
        "stream {home}/bare",
        "{home}/bare has no tokenizer; put the tokenizer.json of its training into {home}/bare",
    ),
    ("stream {home}/small", "{home}/small has 97 vocabulary rows, its tokenizer"),
    (
        f"{STREAM} --layout 1+32",
        "layout 1+32 needs 33 positions but the model was trained on 32; use at most 1+31",
    ),
    (f"{STREAM} --layout 1024", 'layout "1024" is not sinks+window; write it like 1+1023'),
    (f"{STREAM} --layout 4+0", "layout 4+0 is too small"),
    (f"{STREAM} --temperature -1", "--temperature is -1.0; use 0 (most probable token) or more"),
    (f"{STREAM} --temperature nan", "--temperature is nan; use 0"),
    (f"{STREAM} --temperature inf", "--temperature is inf; use 0"),
    (f"{STREAM} --top-p 2", "--top-p is 2.0; use a probability above 0, at most 1"),
    (f"{STREAM} --top-k 0", "--top-k is 0; use 1 or more"),
    (f"{STREAM} --min-p 1.5", "--min-p is 1.5; use a share from 0 to 1"),
    (
        f"{STREAM} --repetition-penalty 0",
        "--repetition-penalty is 0.0; use more than 0 (1 is none)",
    ),
    (f"{STREAM} --turns --prompt -", "--prompt - and --turns both read stdin; write the prompt out"),
    (f"{STREAM} --seed -1", "--seed -1 is out of range"),
    (
        f"{STREAM} --seed 99999999999999999999",
        "--seed 99999999999999999999 is out of range; use 0 to 9223372036",
    ),
    (f"{STREAM} --max-tokens many", "argument --max-tokens: many is not a number of tokens"),
    (f"{STREAM} --max-token 3", 'unrecognized arguments: --max-token 3; did you mean "--max-tokens"?'),
    (f"{STREAM} --device nonsense", "--device nonsense: "),
    (f"{STREAM} --dtype float8", "argument --dtype: invalid choice"),
    (f"{STREAM} --prompt \udcff", "--prompt is not UTF-8 at byte 0; convert it first"),
    # compare and evaluate
    (COMPARE, "the following arguments are required: --text; see sinktrain compare --help"),
    ("compare {home}/sink --text {home}/text.txt", "the following arguments are required: --out"),
    ("evaluate {home}/sink {home}/vanilla --text {home}/text.txt --out {home}/new", "unrecognized arguments"),
    (f"{COMPARE} --text {{home}}/txt.txt", 'no such file or folder; did you mean "text.txt"?'),
    (f"{COMPARE} --text {{home}}/empty.txt", "empty.txt: the file is empty"),
    (f"{COMPARE} --text {{home}}/blank.txt", "holds no usable document"),
    (f"{COMPARE} --text {{home}}/latin.txt", "latin.txt: not UTF-8 at byte 2"),
    (f"{COMPARE} --text {{home}}/short.txt", "tokens of text and scoring starts after 16; use a longer text"),
    (
        f"{COMPARE} --text {{home}}/rows.jsonl",
        'no column "text"; there is "body"; choose one with --text-column',
    ),
    (f"{COMPARE} --text {{home}}/shards", "these shards were not made with the tokenizer of {home}/vanilla"),
    ("evaluate {home}/bare --text {home}/text.txt --out {home}/new", "{home}/bare has no tokenizer"),
    ("evaluate {home}/damaged --text {home}/text.txt --out {home}/new", OLDER),
    ("compare {home}/sink {home}/damaged --text {home}/text.txt --out {home}/new", OLDER),
    ("evaluate {home}/bare --text {home}/truncated --out {home}/new", "belong to another model"),
    ("compare {home}/sink {home}/sink/ --text {home}/text.txt --out {home}/new", "is named twice"),
    ("compare {home}/sink {home}/snk --text {home}/text.txt --out {home}/new", 'did you mean "sink"?'),
    (f"{COMPARE} --text {{home}}/text.txt --layouts 1+7,1+40", "layout 1+40 needs 41 positions"),
    (f"{COMPARE} --text {{home}}/text.txt --layouts 1+7,", 'layout "" is not sinks+window'),
    (f"{COMPARE} --text {{home}}/text.txt --layouts 8,5", "a row of 5 slots is too small; use 6 or more"),
    (
        f"{COMPARE} --text {{home}}/text.txt --policies streamin",
        '"streamin" is not one of streaming, dense, recompute; did you mean "streaming"?',
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --policies ",
        '--policies "" is not one of streaming, dense, recom',
    ),
    (f"{COMPARE} --text {{home}}/text.txt --tasks ", '--tasks "" is not one of telemetry, removal'),
    (
        f"{COMPARE} --text {{home}}/text.txt --tasks removal,telemetri",
        '--tasks "telemetri" is not one of telemetry, removal, latency, streameval, access, zero-shot, '
        "arc_challenge, arc_easy, hellaswag, lambada_openai, openbookqa, piqa, winogrande, none; "
        'did you mean "telemetry"?',
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --tasks none,latency",
        "--tasks none,latency: none stands alone; leave it or the others out",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --quantize kv8,w8a8",
        '--quantize "w8a8" is not one of w8a8-static, w8a8-token, kv8, kv4, all',
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --quantize all,kv4",
        "--quantize all,kv4: all stands alone; leave it or the others out",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --streams 0",
        "argument --streams: 0 is not a number of streams; use 1 or more",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --recompute-tokens inf",
        "argument --recompute-tokens: inf is not a number of tokens; use 1 or more",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --verify -1",
        "argument --verify: -1 is not a number of tokens; use 0 or more",
    ),
    ("compare --out {home}/new", "the following arguments are required: MODEL, --text; see"),
    (
        f"{COMPARE} --text {{home}}/text.txt --verify 8 --from-results {{home}}/results.json",
        "--from-results measures nothing, so leave out --text, --verify, MODEL",
    ),
    ("compare --from-results {home}/none.json --out {home}/new", "{home}/none.json"),
    ("compare --from-results {home}/rows.jsonl --out {home}/new", "{home}/rows.jsonl"),
    (
        "compare --from-results {home}/rows.jsonl --out {home}/notes",
        "--out {home}/notes holds something that is not a report",
    ),
    ("evaluate {home}/sink --from-results x --out {home}/new", "unrecognized arguments: --from-results x"),
    (
        f"{COMPARE} --text {{home}}/text.txt --max-tokens -5",
        "argument --max-tokens: -5 is not a number of tokens",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --subset x",
        "--subset, --split and --revision are for Hub datasets",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --out {{home}}/notes",
        "--out {home}/notes holds something that is not a report",
    ),
    (
        f"{COMPARE} --text {{home}}/text.txt --out {{home}}/text.txt",
        "text.txt holds something that is not a report",
    ),
    # export
    ("export {home}/sink", "the following arguments are required: --out; see sinktrain export --help"),
    ("export {home}/damaged --out {home}/new", OLDER),
    ("export {home}/snk --out {home}/new", 'does not exist; did you mean "sink"?'),
    ("export {home}/sink --out {home}/notes", "{home}/notes is there already and stays as it is"),
    ("export {home}/small --out {home}/new", "{home}/small has a tokenizer of"),
]


@pytest.mark.parametrize(("typed", "message"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_line_and_changes_nothing(run: Run, home: Path, typed: str, message: str) -> None:
    before = contents(home)
    said = run(*typed.format(home=home).split(" "))
    assert_is_mistake(said, typed, message.format(home=home))
    assert contents(home) == before


def assert_is_mistake(said: Said, typed: str, message: str) -> None:
    command = typed.split()[0] if not typed.startswith("-") else ""
    assert said.code == 2
    assert not said.out
    *progress, line = said.err.splitlines()
    assert line.startswith(f"sinktrain {command}".rstrip() + ": ")
    assert message in line
    assert all(PROGRESS.fullmatch(bar) for bar in progress)


def test_a_folder_that_cannot_be_made_is_one_line(run: Run, home: Path) -> None:
    out = home / "text.txt" / "report"
    said = run("evaluate", home / "sink", "--text", home / "text.txt", "--layouts", "1+3", "--out", out)
    assert_is_mistake(said, "evaluate", str(home / "text.txt"))


# -- prepare --------------------------------------------------------------------------------------


def test_prepare_makes_shards_and_says_what_is_in_them(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{TEXT} {number}" for number in range(40)))
    out = tmp_path / "shards"
    options = ("--vocab-size", "300", "--val-fraction", "0.3", "--workers", "1")
    arguments = ("prepare", tmp_path / "text.txt", "--out", out, *options)
    said = run(*arguments)
    assert said.code == 0
    assert re.fullmatch(rf"{out}: [\d,]+ training and [\d,]+ held-out tokens, vocabulary of .*\n", said.out)
    manifest = from_json(run(*arguments, "--json"))
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["val"]["tokens"] > 0
    assert run("prepare", "--verify", out).out == said.out
    assert from_json(run("prepare", "--verify", out, "--json")) == manifest


def test_a_share_of_streameval_lines_is_prepared_when_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PrepareOptions] = []

    def record(options: PrepareOptions) -> None:
        asked.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr("sinktrain.data.prepare.prepare", record)
    for given in ((), ("--streameval-share", "0"), ("--streameval-share", "0.1")):
        run("prepare", "book.txt", "--out", tmp_path, *given)
    assert [options.streameval_share for options in asked] == [None, None, 0.1]


# -- stream ---------------------------------------------------------------------------------------


def continuation(home: Path, prompt: str, max_tokens: int, **options: Any) -> str:
    decoder = StreamingDecoder(load_model(home / "sink"), 1, 15)
    return "".join(stream_text(decoder, tiny_tokenizer(), prompt, max_tokens, **options))


def test_stream_writes_the_prompt_and_its_continuation(run: Run, home: Path) -> None:
    said = run("stream", home / "sink", "--prompt", "So it", "--max-tokens", "30", "--seed", "1")
    assert said == (0, f"So it{continuation(home, 'So it', 30, seed=1)}\n", "")


def test_stream_without_a_prompt_starts_a_document(run: Run, home: Path) -> None:
    said = run("stream", home / "sink", "--max-tokens", "9", "--temperature", "0")
    assert said.out == continuation(home, "", 9, temperature=0.0) + "\n"


def test_stream_takes_every_sampling_option(run: Run, home: Path) -> None:
    options = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "seed": 4,
    }
    typed = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    said = run("stream", home / "sink", "--prompt", "So", "--max-tokens", "30", *typed)
    assert said.out == f"So{continuation(home, 'So', 30, **options)}\n"


@pytest.mark.parametrize(
    "option", ["--temperature 0.1", "--top-k 2", "--top-p 0.1", "--min-p 0.9", "--repetition-penalty 9"]
)
def test_every_sampling_option_changes_the_text(run: Run, home: Path, option: str) -> None:
    arguments = ("stream", home / "sink", "--prompt", "So", "--max-tokens", "30", "--seed", "4")
    assert run(*arguments, *option.split()).out != run(*arguments).out


def test_a_seed_repeats_the_stream_and_none_does_not(run: Run, home: Path) -> None:
    arguments = ("stream", home / "vanilla", "--prompt", "So", "--max-tokens", "40")
    assert run(*arguments, "--seed", "5").out == run(*arguments, "--seed", "5").out
    assert run(*arguments).out != run(*arguments).out


def test_a_layout_is_streamed_as_asked(run: Run, home: Path) -> None:
    model = load_model(home / "sink", dtype=torch.float64)
    decoder = StreamingDecoder(model, 0, 6)
    expected = "".join(stream_text(decoder, tiny_tokenizer(), TEXT[:60], 25, seed=2))
    arguments = ("--layout", "0+6", "--dtype", "float64", "--max-tokens", "25", "--seed", "2")
    assert run("stream", home / "sink", "--prompt", TEXT[:60], *arguments).out == f"{TEXT[:60]}{expected}\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_streamed(run: Run, home: Path, dtype: str) -> None:
    said = run("stream", home / "sink", "--dtype", dtype, "--max-tokens", "20", "--temperature", "0")
    decoder = StreamingDecoder(load_model(home / "sink", dtype=getattr(torch, dtype)), 1, 15)
    assert said.out == "".join(stream_text(decoder, tiny_tokenizer(), "", 20, temperature=0)) + "\n"


def test_a_prompt_is_read_from_stdin(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "naïve 日本語 🙂\n"
    arguments = ("stream", home / "sink", "--max-tokens", "5", "--seed", "1", "--prompt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode()), encoding="ascii"))
    said = run(*arguments, "-")
    assert said.out.startswith(prompt)
    assert said.out == run(*arguments, prompt).out


def test_stdin_that_is_not_utf8_is_a_mistake(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve")))
    said = run("stream", home / "sink", "--prompt", "-")
    assert_is_mistake(said, "stream", "--prompt is not UTF-8 at byte 2; convert it first")


def test_stats_are_on_stderr_and_right(run: Run, home: Path) -> None:
    arguments = ("stream", home / "sink", "--prompt", "So it goes.", "--max-tokens", "12", "--seed", "1")
    plain, said = run(*arguments), run(*arguments, "--stats")
    assert said.out == plain.out
    decoder = StreamingDecoder(load_model(home / "sink"), 1, 15)
    fed = 1 + len(tiny_tokenizer().encode("So it goes.")) + 11  # the last token is not fed
    expected = (
        rf"12 tokens, [\d,.]+ tokens/s, layout 1\+15, "
        rf"cache {decoder.cache_bytes:,} bytes, stream position {fed}, peak memory ([\d,]+) bytes"
    )
    last_line = re.fullmatch(expected, said.err.splitlines()[-1])
    assert last_line
    assert 5e7 < int(last_line[1].replace(",", "")) < 5e10  # a process with torch, in bytes


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_the_stream(home: Path) -> None:
    pipeline = '"$0" stream "$1" --prompt "So it goes." | head -c 20; echo "${PIPESTATUS[0]}" >&2'
    done = subprocess.run(
        ["bash", "-c", pipeline, SINKTRAIN, str(home / "sink")],
        capture_output=True,
        timeout=120,
        env=one_core(),
    )
    assert done.stdout.startswith(b"So it goes.")
    assert len(done.stdout) == 20
    assert done.stderr == b"0\n"


def test_a_reader_that_is_gone_at_once_is_no_defect() -> None:
    """What a command prints was flushed as Python shut down: a traceback and exit code 120."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([SINKTRAIN, "--help"], stdout=write_end, stderr=subprocess.PIPE, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_a_letter_shows_a_question_mark() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([SINKTRAIN, "--help"], capture_output=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"usage: sinktrain COMMAND ?")


def test_ctrl_c_ends_an_endless_stream_with_whole_text_and_its_stats(home: Path) -> None:
    process = subprocess.Popen(
        [SINKTRAIN, "stream", str(home / "vanilla"), "--prompt", "日本語", "--stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=one_core(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    assert process.stdout is not None
    assert process.stderr is not None
    begun = process.stdout.read(300)
    process.send_signal(signal.SIGINT)
    rest, err = process.stdout.read(), process.stderr.read()  # communicate would skip what is buffered
    process.wait(timeout=60)
    assert process.returncode == 130
    text = (begun + rest).decode()
    assert text.startswith("日本語")
    assert text.endswith("\n")
    assert re.match(r"[\d,]+ tokens, .* tokens/s, layout 4\+12, cache", err.decode().splitlines()[-1])
    assert b"Traceback" not in err


# -- stream --turns -------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def replies(home: Path, *turns: str, prompt: str = "", max_tokens: int = 200, **options: Any) -> str:
    decoder = StreamingDecoder(load_model(home / "sink"), 1, 15)
    dialogue = Dialogue(decoder, tiny_tokenizer(), prompt, max_tokens, **options)
    return "".join("".join(dialogue.reply(turn)) + "\n" for turn in turns)


def test_turns_are_answered_line_by_line(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("So it\r\n\n日本".encode())))
    options = ("--temperature", "0.9", "--min-p", "0.01", "--seed", "2")
    said = run("stream", home / "sink", "--turns", "--prompt", "A few\n", "--max-tokens", "9", *options)
    expected = replies(
        home, "So it", "", "日本", prompt="A few\n", max_tokens=9, temperature=0.9, min_p=0.01, seed=2
    )
    assert said == (0, expected, "")


def test_a_reply_has_a_sensible_length_unless_told(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrain.cli.stream.MAX_REPLY_TOKENS", 8)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"So it\n")))
    said = run("stream", home / "sink", "--turns", "--temperature", "0", "--stats")
    assert said.out == replies(home, "So it", max_tokens=8, temperature=0.0)
    assert said.err.splitlines()[-1].startswith("8 tokens, ")


def test_a_terminal_is_asked_for_each_line_and_ctrl_d_ends_it(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("stream", home / "sink", "--turns", "--max-tokens", "3", "--temperature", "0")
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"So\nA few\n")))
    assert run(*arguments) == (0, replies(home, "So", "A few", max_tokens=3, temperature=0.0), "> > > \n")
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    assert run(*arguments) == (0, "", "> \n")


def test_stats_of_a_dialogue_are_of_all_its_turns(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"So\nA few\n")))
    said = run("stream", home / "sink", "--turns", "--max-tokens", "1", "--temperature", "0", "--stats")
    assert said.out == replies(home, "So", "A few", max_tokens=1, temperature=0.0)
    assert said.err.splitlines()[-1].startswith("2 tokens, 0.0 tokens/s, layout 1+15, cache")


def test_a_turn_that_is_not_utf8_is_a_mistake(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve\n")))
    said = run("stream", home / "sink", "--turns")
    assert_is_mistake(said, "stream", "line 1 of stdin is not UTF-8 at byte 2; convert it first")


def test_a_reply_is_whole_before_the_next_line_is_read_and_ctrl_c_ends_the_dialogue(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, seen = io.BytesIO(), []

    class Typing(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            seen.append(shown.getvalue().decode())
            if len(seen) == 3:
                raise KeyboardInterrupt
            return b"So\n"

    monkeypatch.setattr(sys, "stdin", Terminal(Typing()))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="utf-8"))
    arguments = ("--turns", "--max-tokens", "5", "--temperature", "0", "--stats")
    assert cli.main(["stream", str(home / "sink"), *arguments]) == 130
    options = {"max_tokens": 5, "temperature": 0.0}
    assert seen == ["", replies(home, "So", **options), replies(home, "So", "So", **options)]
    asked, stats = capsys.readouterr().err.splitlines()
    assert asked == "> > > "
    assert stats.startswith("10 tokens, ")


def one_core() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# -- evaluate and compare -------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_a_report(run: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report"
    arguments = ("--text", home / "text.txt", "--out", out, "--tasks", "removal")
    said = run("compare", home / "vanilla", home / "sink", *arguments)
    assert said.code == 0
    for word in ("vanilla", "sink", "0+16", "1+15", "2+14", "4+12", "dense"):
        assert word in said.out
    assert said.err.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "report.html", "measured"}


def test_compare_json_is_the_content_of_results(run: Run, home: Path, tmp_path: Path) -> None:
    arguments = ("--text", home / "text.txt", "--out", tmp_path / "report", "--layouts", "1+7,0+8", "--json")
    options = ("--max-tokens", "inf", "--tasks", "none")
    said = run("compare", home / "vanilla", home / "sink", *arguments, *options)
    results = from_json(said)
    assert results == json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["environment"]["max_tokens"] is None
    assert results["quantized"] == []  # unless asked for
    assert [model["name"] for model in results["models"]] == ["vanilla", "sink"]


def test_evaluate_measures_one_model(run: Run, home: Path, tmp_path: Path) -> None:
    arguments = ("--text", home / "text.txt", "--out", tmp_path / "report", "--policies", "streaming")
    sizes = ("--max-tokens", "200", "--streams", "2", "--verify", "20", "--dtype", "float64")
    options = (*sizes, "--tasks", "none", "--json")
    results = from_json(run("evaluate", home / "sink", *arguments, *options))
    assert len(results["perplexity"]) == 4
    assert {row["tokens_scored"] for row in results["perplexity"]} == {2 * (100 - 16)}
    assert {row["num_tokens"] for row in results["verified"]} == {20}
    assert all(row["max_logit_diff"] < 1e-10 for row in results["verified"])
    environment = results["environment"]
    assert (environment["max_tokens"], environment["num_streams"], environment["dtype"]) == (
        200,
        2,
        "float64",
    )


def test_an_earlier_report_is_replaced_and_what_lies_beside_it_kept(
    run: Run, home: Path, tmp_path: Path
) -> None:
    options = ("--policies", "streaming", "--tasks", "none")
    arguments = ("--text", home / "text.txt", "--out", tmp_path, *options, "--layouts")
    assert run("evaluate", home / "sink", *arguments, "1+7").code == 0
    (tmp_path / "notes.md").write_text("mine")
    assert run("evaluate", home / "sink", *arguments, "1+11").code == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["perplexity"]
    assert row["window"] == 11
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_comparison_that_was_cut_off_goes_on_in_its_folder(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--text", home / "text.txt", "--out", tmp_path, "--policies", "streaming", "--tasks", "none")
    with monkeypatch.context() as cut:
        cut.setattr(comparing, "between_models", interrupted)
        assert run("compare", home / "vanilla", home / "sink", *arguments).code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["measured"]
    (tmp_path / "mine").mkdir()
    said = run("compare", home / "vanilla", home / "sink", *arguments)
    assert_is_mistake(said, "compare", "holds something that is not a report")
    (tmp_path / "mine").rmdir()
    monkeypatch.setattr("sinktrain.evaluation.arms.measure", interrupted)
    assert run("compare", home / "vanilla", home / "sink", *arguments).code == 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    """The comparisons that commands ask for; none is made, and each has two models and no failure."""
    asked: list[Comparison] = []

    def record(request: Comparison) -> dict[str, Any]:
        asked.append(request)
        return {**example_results(), "failed": []}

    monkeypatch.setattr(comparing, "compare", record)
    return asked


def test_options_of_compare_reach_the_comparison(
    run: Run, asked: list[Comparison], home: Path, tmp_path: Path
) -> None:
    texts = ("--text", home / "text.txt", "--text", "b.jsonl", "--text-column", "body")
    rows = ("--layouts", "8,3+5,1+7", "--policies", "recompute,dense,dense", "--tasks", "access,removal")
    sizes = ("--max-tokens", "2_000", "--streams", "3", "--recompute-tokens", "50", "--verify", "40")
    options = (*texts, *rows, *sizes, "--device", "cpu", "--dtype", "float64", "--out", tmp_path / "a b")
    arguments = ("compare", home / "vanilla", *options, home / "sink")
    assert run(*arguments).code == 0
    (request,) = asked
    assert request == Comparison(
        models=[str(home / "vanilla"), str(home / "sink")],
        texts=[Source(str(home / "text.txt"), "body"), Source("b.jsonl", "body")],
        layouts=[Layout(0, 8), Layout(1, 7), Layout(2, 6), Layout(4, 4), Layout(3, 5)],
        policies=("recompute", "dense"),
        tasks=("access", "removal"),
        max_tokens=2000,
        num_streams=3,
        recompute_tokens=50,
        verify_tokens=40,
        device="cpu",
        dtype=torch.float64,
        out=tmp_path / "a b",
        command=request.command,
    )
    assert shlex.split(request.command) == ["sinktrain", *map(str, arguments)]


def test_compare_measures_everything_unless_told(run: Run, asked: list[Comparison], tmp_path: Path) -> None:
    assert run("evaluate", "model", "--text", "text", "--device", "cpu", "--out", tmp_path).code == 0
    assert run("compare", "a", "--text", "text", "--tasks", "none", "--out", tmp_path).code == 0
    (request, without) = asked
    assert (request.layouts, request.max_tokens, request.num_streams) == ([], 65_536, 8)
    assert (request.recompute_tokens, request.verify_tokens) == (4096, 0)
    assert (request.policies, request.tasks) == (("streaming", "dense"), comparing.TASKS)
    assert without.tasks == ()
    assert request.dtype == torch.float32
    assert request.command.startswith("sinktrain evaluate model --text text --device cpu --out /")


def test_a_gpu_computes_in_bfloat16_unless_told(
    run: Run, asked: list[Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrain.cli.compare.chosen_device", lambda _: "cuda:1")
    arguments = ("evaluate", "model", "--text", "text", "--out", tmp_path)
    assert run(*arguments).code == run(*arguments, "--dtype", "float32").code == 0
    assert [request.dtype for request in asked] == [torch.bfloat16, torch.float32]


def test_missing_wandb_is_told_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrain.report.wandb_log.find_spec", lambda _: None)
    monkeypatch.setattr(comparing, "compare", lambda _: pytest.fail("measured"))
    said = run("compare", "a", "--text", "text", "--out", tmp_path, "--wandb", "sinks")
    assert said.code == 2
    assert said.err == (
        "sinktrain compare: --wandb sinks needs the package wandb; pip install 'sinktrain[wandb]', "
        "or leave it out\n"
    )


def test_models_that_failed_are_named_after_the_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = [{"model": "first", "error": "no such\nfile"}, {"model": "b", "error": "runs/b is damaged"}]
    monkeypatch.setattr(comparing, "compare", lambda _: {**example_results(), "failed": failed})
    said = run("compare", "a", "b", "--text", "text", "--out", tmp_path, "--json")
    assert said.code == 2
    report, *lines = said.err.splitlines()
    assert report == f"report: {tmp_path / 'report.html'}"
    kept = "the others' results are kept, the same command tries it again"
    assert lines == [
        f"sinktrain compare: first: no such file; {kept}",
        f"sinktrain compare: runs/b is damaged; {kept}",
    ]
    assert json.loads(said.out) == json.loads((tmp_path / "results.json").read_text())


def test_a_report_is_rendered_again_without_torch(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(example_results()))
    script = (
        "import sys; from sinktrain.cli import main\n"
        "assert main(['compare', '--from-results', sys.argv[1], '--out', sys.argv[2]]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    arguments = [str(tmp_path / "results.json"), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True
    )
    assert "vanilla" in done.stdout
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "results.json",
        "results.md",
        "report.html",
    }
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == example_results()


def test_results_are_logged_to_wandb_when_asked(
    run: Run, asked: list[Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinktrain.report.wandb_log.check_wandb", lambda _: None)  # whether it is here or not
    logged: list[Any] = []
    monkeypatch.setattr("sinktrain.report.wandb_log.log_report", lambda *given: logged.append(given))
    assert run("compare", "a", "--text", "text", "--out", tmp_path).code == 0
    assert not logged
    assert run("compare", "a", "--text", "text", "--out", tmp_path, "--wandb", "sinks").code == 0
    again = ("compare", "--from-results", tmp_path / "results.json", "--out", tmp_path, "--wandb", "more")
    assert run(*again).code == 0
    assert [(out, project) for _, out, project in logged] == [(tmp_path, "sinks"), (tmp_path, "more")]
    assert logged[0][0] == logged[1][0] == {**example_results(), "failed": []}


# -- export ---------------------------------------------------------------------------------------


def test_an_export_streams_as_the_run_does(run: Run, home: Path, tmp_path: Path) -> None:
    said = run("export", home / "sink", "--out", tmp_path / "model")
    assert said.code == 0
    assert re.match(rf"{tmp_path}/model: loads with plain transformers; its logits differ by \d", said.out)
    stream = ("--prompt", "So it", "--max-tokens", "20", "--seed", "1")
    assert run("stream", tmp_path / "model", *stream).out == run("stream", home / "sink", *stream).out


def test_export_without_a_tokenizer_says_so(run: Run, home: Path, tmp_path: Path) -> None:
    said = run("export", home / "bare", "--out", tmp_path / "model", "--json")
    result = from_json(said)
    assert (result["folder"], result["has_tokenizer"]) == (str(tmp_path / "model"), False)
    said = run("export", home / "bare", "--out", tmp_path / "again")
    assert f"{home / 'bare'} has no tokenizer, so there is none in the folder" in said.err
