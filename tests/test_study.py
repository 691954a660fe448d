"""A study trains what is missing, skips what is finished, goes on when killed, and compares the rest."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_shards import TINY

from sinktrain.cli import main
from sinktrain.data.shards import read_manifest
from sinktrain.errors import ConfigError
from sinktrain.experiments.study import chosen_runs, run_study, write_files
from sinktrain.experiments.study_board import StudyBoard
from sinktrain.experiments.study_commands import (
    Options,
    compare_arguments,
    fit_arguments,
    prepare_arguments,
    publish_arguments,
)
from sinktrain.experiments.study_file import digest, merged, read_study, shipped_studies
from sinktrain.experiments.study_pool import Board, Job, StudyStopped, call, train_all
from sinktrain.experiments.study_training import adopt, begin, devices_of, is_done, recipes

ARMS = {"vanilla": {}, "sink": {"config": "sink"}}
RESULTS = "compare/results.json"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a study of tiny runs, changed as asked."""
    base, text = tmp_path / "tiny.yaml", tmp_path / "book.txt"
    base.write_text(TINY)
    text.write_text("A book.")

    def study(**changes: Any) -> Path:
        said = {"text": str(text), "base": [str(base)], "arms": ARMS, "seeds": [1, 2]} | changes
        path = tmp_path / "study.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in said.items() if value is not None}, sort_keys=False)
        )
        return path

    return study


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quickstart", "ten-minutes-h100", "emergence", "weight-decay", "paper"])
def test_a_shipped_study_is_read_by_name_and_its_first_line_says_what_it_is(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert len(study.arms) > 1
    assert shipped_studies()[name].read_text().startswith("# ")
    assert all(study.recipe(run)["seed_everything"] == run.seed for run in study.runs)


def test_runs_are_arms_times_seeds_and_one_seed_needs_no_number(write: Callable[..., Path]) -> None:
    assert [run.name for run in read_study(str(write())).runs] == [
        *("vanilla-1", "sink-1", "vanilla-2", "sink-2"),
    ]
    assert [run.name for run in read_study(str(write(seeds=[7]))).runs] == ["vanilla", "sink"]


def test_an_arms_settings_stand_over_the_studys_and_those_over_the_configs(
    write: Callable[..., Path],
) -> None:
    settings = {"trainer": {"max_steps": 7}, "model": {"learning_rate": 0.5}}
    arms = {"a": {"model": {"learning_rate": 0.25}}, "b": {"config": ["sink"]}}
    study = read_study(str(write(settings=settings, arms=arms, seeds=[3])))
    a, b = (study.recipe(run) for run in study.runs)
    assert (a["trainer"]["max_steps"], a["model"]["learning_rate"], a["model"]["arm"]) == (7, 0.25, "a")
    assert (b["model"]["learning_rate"], b["model"]["sink"]["kind"]) == (0.5, "token")
    assert a["data"] == b["data"] == yaml.safe_load(TINY)["data"]


def test_only_a_mapping_is_laid_over_a_mapping() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2},
        "d": {"e": 5},
    }


def test_another_recipe_seed_or_text_has_another_digest(write: Callable[..., Path]) -> None:
    study = read_study(str(write()))
    faster = read_study(str(write(settings={"model": {"learning_rate": 0.5}})))
    said = [digest(one.recipe(run), "data") for one in (study, faster) for run in one.runs]
    said.append(digest(study.recipe(study.runs[0]), "other data"))
    assert len(set(said)) == 9
    assert said[0] == digest(read_study(str(write())).recipe(study.runs[0]), "data")


MISTAKES = {
    "arms: {}": "arms names what is compared",
    "arms: [vanilla]": "arms is ['vanilla']; it should hold names and values",
    "arms: {A b: {}}": "arms.A b: use small letters, digits, - and _, as in folders",
    "arms: {a: {config: snk}}": 'no shipped config of that name; did you mean "sink"?',
    "base: []": "base is []; name a config, or a list of them",
    "seeds: [1, 1]": "seeds is [1, 1]; use a list of different numbers",
    "seeds: [one]": "seeds is ['one']; use a list of different numbers",
    "seeds: [0]": "seeds is [0]; use a list of different numbers from 1 on",
    "arms: {compare: {}}": "arms.compare: the study's folder has its own compare; choose another name",
    "text: [a.txt, b.txt]": "text is ['a.txt', 'b.txt']; name one file or folder",
    "seed: [1]": 'no "seed"; did you mean "seeds"?; there are about, text',
    "compare: {layout: 64}": 'no "compare.layout"; did you mean "layouts"?',
    "shards: there": "names both text, which is prepared, and shards, which are there; leave one out",
    "publish: {private: true}": "publish needs a repo_id: ORG/NAME",
    "compare: {layouts: a+b}": "compare.layouts: a+b is no layout; write sinks + window as 1+127, or N alone",
    "[": "is no YAML file: line 1: expected the node content",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_is_one_line(
    mistake: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write()
    if mistake == "[":
        path.write_text(mistake)
    else:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | yaml.safe_load(mistake)))
    assert main(["study", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sinktrain study: {path}")
    assert MISTAKES[mistake] in said
    assert said.count("\n") == 1


TYPED = {
    "quickstrt": 'no such file, and no shipped study of that name; did you mean "quickstart"?',
    "xyz": "no such file, and no shipped study of that name; there are emergence, pair, paper, ",
    "quickstart --only snk": "--only snk: the study has vanilla, sink",
    "quickstart --seeds 5": "--seeds 5: the study has 1234",
    "quickstart --seeds one": "--seeds one is not a list of numbers from 1 on",
    "quickstart --stages trian": '--stages trian; did you mean "train"?; there are prepare, train, ',
    "quickstart --gpus-per-run none": "--gpus-per-run none; use a number from 1 on, or all",
    "emergence": "the study emergence leaves open what to train on; give --text TEXT",
    "quickstart --stages train": "runs/quickstart/shards: no prepared shards here",
}


@pytest.mark.parametrize("typed", TYPED)
def test_a_mistake_in_the_command_is_one_line_and_makes_nothing(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *typed.split()]) == 2
    said = capsys.readouterr().err
    assert TYPED[typed] in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- commands -------------------------------------------------------------------------------------


def test_commands_are_those_that_a_user_would_type(write: Callable[..., Path], tmp_path: Path) -> None:
    compare = {"layouts": 16, "tasks": "none", "text": "more.txt"}
    study = read_study(str(write(prepare={"vocab_size": 300}, compare=compare)))
    options = Options(out=tmp_path / "out", accelerator="cpu")
    shards = options.out / "shards"
    assert prepare_arguments(study, options) == [
        *(str(tmp_path / "book.txt"), "--out", str(shards), "--vocab-size", "300")
    ]
    sink = study.runs[1]
    assert fit_arguments(study, sink, shards, options, num_gpus=1) == [
        *("--config", study.base[0], "--config", "sink"),
        *("--config", f"{options.out}/configs/sink.yaml", "--run", f"{options.out}/sink-1"),
        *("--data.path", str(shards), "--seed_everything", "1", "--trainer.accelerator", "cpu"),
    ]
    several = " ".join(fit_arguments(study, sink, shards, options, num_gpus=4))
    assert several.startswith(f"--config ddp --config {study.base[0]} ")  # whose own strategy stands over it
    assert several.count("--trainer.devices 4") == 1
    assert compare_arguments(study, study.runs, shards, options) == [
        *(f"{options.out}/{name}" for name in ("vanilla-1", "vanilla-2", "sink-1", "sink-2")),
        *("--text", str(shards), "--text", "more.txt", "--out", f"{options.out}/compare"),
        *("--layouts", "16", "--tasks", "none", "--device", "cpu"),
    ]


def test_arms_and_seeds_can_be_chosen(write: Callable[..., Path]) -> None:
    study = read_study(str(write()))
    chosen = chosen_runs(study, Options(Path(), only=("sink",), seeds=(2,)))
    assert [run.name for run in chosen] == ["sink-2"]


# -- jobs -----------------------------------------------------------------------------------------


class Silent(Board):
    def show(self, jobs: Sequence[Job]) -> None:
        """Nobody looks."""


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code], folder / name, folder / "logs" / f"{name}.log")


def test_a_job_that_fails_stops_no_other_and_each_has_its_device(tmp_path: Path) -> None:
    tell = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [
        job(tmp_path, "bad", "print('why'); exit(3)"),
        *(job(tmp_path, f"good-{i}", tell) for i in range(3)),
    ]
    begun: list[str] = []
    train_all(jobs, ["0,1", "2,3"], Silent(), lambda one: begun.append(one.name))
    assert [one.state for one in jobs] == ["failed", "finished", "finished", "finished"]
    assert (jobs[0].last_line, jobs[0].exit_code) == ("why", 3)
    assert {one.last_line for one in jobs[1:]} <= {"0,1", "2,3"}
    assert begun == [one.name for one in jobs]


def test_a_job_waits_for_the_process_that_trains_in_its_folder(tmp_path: Path) -> None:
    """As one of a killed study does, which is still saving."""
    from sinktrain.training.run import RunFolder

    waits = job(tmp_path, "run", "pass")
    hold = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(waits.run)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert hold.stdout is not None
    assert hold.stdout.readline() == "held\n"
    states: list[str] = []

    class Watch(Board):
        def show(self, jobs: Sequence[Job]) -> None:
            states.append(jobs[0].state)
            if len(states) == 2:
                hold.communicate("")

    train_all([waits], [None], Watch(), lambda _: None)
    assert states[:2] == ["waiting", "waiting"]
    assert states[-1] == "finished"
    with RunFolder(waits.run).locked():
        """Nobody holds it any more."""


HOLD = """
import sys
from pathlib import Path
from sinktrain.training.run import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""

ENDLESS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
while True:
    time.sleep(0.01)
"""


def test_a_signal_reaches_what_runs_and_nothing_more_is_started(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "first", ENDLESS), job(tmp_path, "second", "pass")]

    class Interrupt(Board):
        def show(self, jobs: Sequence[Job]) -> None:
            if jobs[0].state == "training" and jobs[0].elapsed_s > 0.5:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StudyStopped, match="stopped by SIGTERM; the same command continues"):
        train_all(jobs, [None], Interrupt(), lambda _: None)
    assert [one.state for one in jobs] == ["stopped", "waiting"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_board_tells_what_runs_what_ended_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinktrain.training.metrics_table import MetricsTable

    jobs = [job(tmp_path, name, "") for name in ("a", "b", "c")]
    board = StudyBoard("tiny", num_devices=1, num_done=1)
    board.show(jobs)
    jobs[0].state, jobs[0].exit_code, jobs[0].elapsed_s = "finished", 0, 60.0
    jobs[1].state, jobs[1].elapsed_s = "training", 20.0
    jobs[1].run.mkdir()
    MetricsTable(jobs[1].run / "metrics.csv").append(500, {"train/loss": 3.25, "eta_s": 30.0})
    board.show(jobs)
    monkeypatch.setattr("sinktrain.experiments.study_board.LOG_INTERVAL_S", 0.0)
    board.show(jobs)
    assert capsys.readouterr().err.splitlines() == [
        "tiny: a finished  0:01:00",
        "tiny: b training  step 500, loss 3.250, 0:00:30 left",
        "tiny: 2 of 4 runs done, 0:01:25 left; b step 500, loss 3.250, 0:00:30 left",
    ]


def test_a_killed_job_is_said_to_be_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = job(tmp_path, "a", "import os; os.kill(os.getpid(), 9)")
    train_all([killed], [None], StudyBoard("tiny", num_devices=1, num_done=0), lambda _: None)
    assert f"tiny: a failed    killed by SIGKILL ({killed.log})" in capsys.readouterr().err.splitlines()


def test_a_failed_run_is_not_done_and_a_line_is_never_wider_than_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    bad = job(tmp_path, "bad", "")
    bad.log.parent.mkdir()
    bad.log.write_text("\x1b[2J" + 100 * "long ")
    bad.state, bad.exit_code = "failed", 2
    StudyBoard("tiny", num_devices=1, num_done=0).show([bad])
    first, last, _ = capsys.readouterr().err.split("\n")
    assert len(first.removeprefix("\x1b[K")) == 59
    assert "\x1b" not in first.removeprefix("\x1b[K")
    assert last.endswith("tiny: 0 of 1 runs done")


def test_a_signal_ends_a_command_of_the_study_too(tmp_path: Path) -> None:
    code = f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{ENDLESS}"
    watch = threading.Thread(target=signal_when_there, args=[tmp_path / "pid"])
    watch.start()
    with pytest.raises(StudyStopped, match="SIGTERM"):
        call([sys.executable, "-c", code])
    watch.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert call([sys.executable, "-c", "exit(3)"]) == 3


def signal_when_there(path: Path) -> None:
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def test_gpus_are_those_that_are_ours_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of(Options(Path(), gpus_per_run=2)) == (["0,1", "2,3"], 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6,7")
    assert devices_of(Options(Path())) == (["4", "5", "GPU-6", "7"], 1)
    assert devices_of(Options(Path(), gpus_per_run=3)) == (["4,5,GPU-6"], 3)
    assert devices_of(Options(Path(), gpus_per_run=0)) == ([None], 4)
    with pytest.raises(ConfigError, match="--gpus-per-run 5: of GPUs there are 4 here; use all, or fewer"):
        devices_of(Options(Path(), gpus_per_run=5))


# -- the whole ------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone_and_left_out_by_another_recipe(
    write: Callable[..., Path],
    shards: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = {"text": None, "shards": str(shards), "arms": {"vanilla": {}}, "seeds": [1]}
    study, options = read_study(str(write(**said))), Options(tmp_path / "out", ("train",), accelerator="cpu")
    [run], data = study.runs, read_manifest(shards).fingerprint
    begin(run.name, digest(study.recipe(run), data), options)
    train(f"out/{run.name}")
    written = (options.out / "vanilla" / "manifest.json").stat().st_mtime_ns
    run_study(study, options)
    assert (options.out / "vanilla" / "manifest.json").stat().st_mtime_ns == written
    [told] = json.loads((options.out / "study.json").read_text())["runs"]
    assert (told["run"], told["global_step"]) == ("vanilla", 12)
    longer = read_study(str(write(**said, settings={"trainer": {"max_steps": 13}})))
    assert not is_done(longer.runs[0], digest(longer.recipe(longer.runs[0]), data), options)
    run_study(longer, replace(options, stages=("compare",)))
    assert "vanilla: trained with another recipe; left out" in capfd.readouterr().err
    assert json.loads((options.out / "study.json").read_text())["runs"] == []


def test_a_run_stays_when_seeds_join_it_or_leave(
    write: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    said = {"text": None, "shards": str(shards), "arms": {"vanilla": {}}}
    out, data = tmp_path / "out", read_manifest(shards).fingerprint
    options, one = Options(out, ("compare",), accelerator="cpu"), read_study(str(write(**said, seeds=[1])))
    begin("vanilla", digest(one.recipe(one.runs[0]), data), options)
    (out / "vanilla").mkdir()
    (out / "vanilla" / "work").touch()
    two = read_study(str(write(**said, seeds=[1, 2])))
    for study, name in ((two, "vanilla-1"), (two, "vanilla-1"), (one, "vanilla")):
        adopt(study, recipes(study, data), options)
        assert (out / name / "work").exists()
        assert [path.name for path in out.glob("vanilla*")] == [name]
        assert [path.name for path in (out / "state").iterdir()] == [f"{name}.json"]
    other = read_study(str(write(**said, seeds=[3, 4])))
    adopt(other, recipes(other, data), options)
    assert (out / "vanilla" / "work").exists()


@pytest.mark.slow  # a process that imports lightning
def test_a_run_is_trained_once_and_again_only_by_another_recipe(
    write: Callable[..., Path], shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arms = {"vanilla": {}}
    study = read_study(str(write(text=None, shards=str(shards), arms=arms, seeds=[1])))
    options = Options(tmp_path / "out", stages=("train",), accelerator="cpu")
    run_study(study, options)
    written = (options.out / "vanilla" / "manifest.json").stat().st_mtime_ns
    told = json.loads((options.out / "study.json").read_text())["runs"]
    assert [one["run"] for one in told] == ["vanilla"]
    assert told[0]["global_step"] == 12
    assert told[0]["hardware"]["train_seconds"] > 0
    moved = replace(options, out=tmp_path / "moved")
    shutil.move(options.out, moved.out)
    run_study(study, moved)
    assert (moved.out / "vanilla" / "manifest.json").stat().st_mtime_ns == written
    longer = read_study(
        str(
            write(
                text=None, shards=str(shards), arms=arms, seeds=[1], settings={"trainer": {"max_steps": 13}}
            )
        )
    )
    data = read_manifest(shards).fingerprint
    [old], [new] = study.runs, longer.runs
    assert is_done(old, digest(study.recipe(old), data), moved)
    assert not is_done(new, digest(longer.recipe(new), data), moved)
    run_study(longer, replace(moved, stages=("compare",)))
    assert "vanilla: trained with another recipe; left out" in capfd.readouterr().err
    assert json.loads((moved.out / "study.json").read_text())["runs"] == []


@pytest.mark.slow
def test_a_finished_run_whose_recipe_changed_is_trained_anew_and_kept(
    write: Callable[..., Path], shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = Options(tmp_path / "out", stages=("train",), accelerator="cpu")
    for rate in (0.001, 0.002):  # which fit alone would not mind: it would say that the run has finished
        settings = {"model": {"learning_rate": rate}}
        said = write(text=None, shards=str(shards), arms={"vanilla": {}}, seeds=[1], settings=settings)
        run_study(read_study(str(said)), options)
    [kept] = (options.out / "former").iterdir()
    assert "vanilla: was trained with another recipe, now in " in capfd.readouterr().err
    log = (options.out / "logs" / "vanilla.log").read_text()
    assert log.count("from the start") == log.count("finished at step 12") == 2
    runs = kept, options.out / "vanilla"
    losses = {json.loads((run / "manifest.json").read_text())["val_loss_nats"] for run in runs}
    assert len(losses) == 2


def test_a_run_of_another_recipe_makes_room_and_none_is_lost(tmp_path: Path) -> None:
    for recipe in ("a", "a", "b", "a", "b"):
        begin("run", recipe, Options(tmp_path))
        (tmp_path / "run").mkdir(exist_ok=True)
    kept = sorted(path.name for path in (tmp_path / "former").iterdir())
    assert kept == ["run-a", "run-a-again", "run-b"]


def test_a_dry_run_counts_and_makes_nothing(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write())
    before = sorted(tmp_path.rglob("*"))
    assert main(["study", path, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == ["vanilla-1", "sink-1", "vanilla-2", "sink-2"]
    assert {row["tokens"] for row in rows} == {12 * 8 * 32}
    assert main(["study", path, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "4 of 4 runs to train: 0.0M tokens" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


REFUSED = (
    ({"base": ["sink"]}, "vanilla-1: its configs need a model.network and a trainer.max_steps"),
    (
        {"arms": {"a": {"trainer": {"max_step": 9}}}},
        'arm a: unknown setting "trainer.max_step"; did you mean "trainer.max_steps"?',
    ),
    ({"settings": {"trainer": {"max_steps": "lots"}}}, "arm vanilla: "),
    ({"text": "nothere.txt"}, "text nothere.txt: no such file or folder; mend it, or give --text TEXT"),
    ({"text": None}, "the study study leaves open what to train on; give --text TEXT"),
    ({"text": None, "shards": "nothere"}, "nothere: no prepared shards here"),
)


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:24])
def test_a_dry_run_refuses_what_would_not_run(
    changes: Any, message: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(write(**changes)), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sinktrain study: {message}")
    assert said.count("\n") == 1


def test_a_study_file_in_its_own_folder_keeps_its_comments(write: Callable[..., Path]) -> None:
    path = write()
    path.write_text(f"# mine\n{path.read_text()}")
    write_files(replace(read_study(str(path)), name="other"), Options(path.parent))
    assert path.read_text().startswith("# mine\n")
    write_files(read_study(str(write(seeds=[3]))), Options(path.parent / "out"))
    assert read_study(str(path.parent / "out" / "study.yaml")).seeds == (3,)


def test_what_is_published_without_a_comparison_names_none(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    study = read_study(str(write(publish={"repo_id": "lab/x", "private": True})))
    options = Options(tmp_path / "out")
    runs = [f"{options.out}/{run.name}" for run in study.runs]
    asked = ["--repo-id", "lab/x", "--private"]
    assert publish_arguments(study, study.runs, options) == [*runs, *asked]
    (options.out / "compare").mkdir(parents=True)
    results = ["--results", f"{options.out}/compare"]
    assert publish_arguments(study, study.runs, options) == [*runs, *results, *asked]


SBATCH = """#!/bin/bash
echo "$*" >>"$SBATCH_LOG"
echo "4$(wc -l <"$SBATCH_LOG");cluster"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A PATH with a stand-in for sbatch, which notes what it was asked in ``tmp_path / "log"``."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "log"))
    return f"{sbatch.parent}:{os.environ['PATH']}"


def test_on_slurm_each_run_is_a_task_and_a_job_behind_them_compares(
    write: Callable[..., Path],
    shards: Path,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(write(text=None, shards=str(shards)))
    typed = ["study", path, "--out", str(tmp_path / "out"), "--launcher", "slurm"]
    assert main(typed) == 2
    assert "no sbatch here; " in capsys.readouterr().err
    monkeypatch.setenv("PATH", cluster)
    assert main(typed) == 0
    assert capsys.readouterr().out.startswith("submitted as jobs 41 and 42; watch ")
    array, rest = (tmp_path / "log").read_text().splitlines()
    assert array == f"--parsable {tmp_path}/out/slurm.sh"
    assert "--dependency=afterany:41" in rest
    assert rest.endswith("--stages compare,publish")
    script = (tmp_path / "out" / "slurm.sh").read_text()
    assert "#SBATCH --array=0-3\n" in script
    subprocess.run(["bash", "-n", tmp_path / "out" / "slurm.sh"], check=True)
    dry = script.replace("exec ", "echo ")
    told = subprocess.run(
        ["bash", "-c", dry],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.endswith("--stages train --only sink --seeds 2\n")


def test_slurm_gets_what_was_asked_and_no_name_is_a_command(
    write: Callable[..., Path],
    shards: Path,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", cluster)
    path = write(text=None).rename(tmp_path / "a'b\ntouch oops #.yaml")
    out = tmp_path / "o u't"
    typed = ["study", str(path), "--out", str(out), "--text", str(shards), "--launcher", "slurm"]
    assert main([*typed, "--gpus-per-run", "all"]) == 2
    assert "--gpus-per-run all: SLURM asks how many" in capsys.readouterr().err
    assert main([*typed, "--gpus-per-run", "2", "--stages", "train", "--only", "sink"]) == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1, "no job compares, as none was asked to"
    script = (out / "slurm.sh").read_text()
    assert "\n#SBATCH --gpus-per-node=2\n" in script
    assert "\n#SBATCH --signal=B:SIGTERM@120\n" in script, "the study is the batch shell, and no step of it"
    assert "\ntouch oops" not in script.split("exec ")[0]
    output = next(line for line in script.splitlines() if "--output" in line)
    assert shlex.split(output.removeprefix("#SBATCH")) == [f"--output={out}/logs/slurm-%a.log"]
    dry = script.replace("exec ", "printf '%s\\0' ")
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    told = subprocess.run(["bash", "-c", dry], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split("\0")[3:-1] == [
        *("study", str(path), "--out", str(out), "--text", str(shards), "--gpus-per-run", "2"),
        *("--stages", "train", "--only", "sink", "--seeds", "2"),
    ]
    assert main([*typed, "--device", "cpu"]) == 0
    assert "gpus-per-node" not in (out / "slurm.sh").read_text() + (tmp_path / "log").read_text()


@pytest.fixture
def shakespeare(write: Callable[..., Path]) -> Path:
    """A study of two arms and two seeds on the shipped text that takes a minute."""
    settings = {
        "model": {"network": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}},
        "trainer": {"max_steps": 40, "val_check_interval": 20},
    }
    prepare = {"vocab_size": 512, "max_tokens": 300_000, "val_fraction": 0.3}
    compare = {"layouts": 16, "max_tokens": 4000, "tasks": "none"}
    text = "data/shakespeare.txt.xz"
    return write(text=text, prepare=prepare, settings=settings, compare=compare)


def numbers(out: Path) -> Any:
    """What a study found, without when and where."""
    results = json.loads((out / RESULTS).read_text())
    return [*results["perplexity"], *results["paired"]]


def start(study: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sinktrain", "study", str(study), "--out", str(out), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow  # some 14 processes that import lightning
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_study_killed_anywhere_ends_with_the_same_table(
    signum: signal.Signals, shakespeare: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    told, _ = start(shakespeare, whole).communicate(timeout=400)
    assert (whole / RESULTS).exists(), told
    for seconds in (6, 14, 25):
        process = start(shakespeare, parts)
        time.sleep(seconds)
        process.send_signal(signum)
        told, _ = process.communicate(timeout=100)
        assert process.returncode in (0, -signum, 128 + signum), told
    process = start(shakespeare, parts)
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert numbers(parts) == numbers(whole)


@pytest.mark.slow
def test_a_failed_arm_stops_no_other_and_is_named_at_the_end(
    write: Callable[..., Path], shakespeare: Path, tmp_path: Path
) -> None:
    said = yaml.safe_load(shakespeare.read_text())
    said["arms"]["bad"] = {"model": {"learning_rate": -1.0}}
    said["seeds"] = [1]
    shakespeare.write_text(yaml.safe_dump(said))
    process = start(shakespeare, tmp_path / "out")
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 2, told
    assert "sinktrain study: bad failed, see " in told.splitlines()[-1]
    assert "bad failed    sinktrain fit: model.learning_rate is -1.0; use more than 0" in told
    assert {row["model"] for row in numbers(tmp_path / "out")[:10] if "model" in row} == {"vanilla", "sink"}
