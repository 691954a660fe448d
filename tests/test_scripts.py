"""The shell scripts, with a Python that only pretends to install; the pinned releases; the shipped text."""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["scripts/setup", "scripts/quickstart", "scripts/test", "scripts/check", ".ci/run"]

# Does what the scripts ask of an interpreter: runs code, "makes" a venv, "installs" commands, "runs" pytest.
# It and the commands note what they were asked in $FAKE_LOG; $FAKE_FAILS names what fails.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *"-m venv"*)
    echo venv >>"$FAKE_LOG"
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    touch .venv/bin/pip && chmod +x .venv/bin/pip ;;
  *"pip config"*) exit 1 ;;
  *"pip install"*)
    echo "pip $*" >>"$FAKE_LOG"
    [[ "$FAKE_FAILS" != *pip* ]] || exit 1
    cp "$FAKE_UV" .venv/bin/uv
    for command in sinktrain ruff mypy lint-imports; do cp "$FAKE_COMMAND" ".venv/bin/$command"; done ;;
  *"-m pytest"*) echo "$*" >>"$FAKE_LOG" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""
FAKE_UV = """#!/bin/bash
echo "uv $* find-links=$UV_FIND_LINKS" >>"$FAKE_LOG"
sleep "${FAKE_UV_SECONDS:-0}"
[[ "$FAKE_FAILS" != *uv* ]]
"""
FAKE_COMMAND = """#!/bin/bash
echo "${0##*/} $*" >>"$FAKE_LOG"
echo "said by ${0##*/} $1"
[ "$1" != "$FAKE_FAILS" ] || exit 7
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of what the scripts need, in a folder with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.elsewhere = folder
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.log = folder / "log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(executable(folder / "python", FAKE_PYTHON)),
            "REAL_PYTHON": sys.executable,
            "FAKE_UV": str(executable(folder / "uv", FAKE_UV)),
            "FAKE_COMMAND": str(executable(folder / "command", FAKE_COMMAND)),
            "FAKE_LOG": str(self.log),
            "FAKE_FAILS": "nothing",
        }

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.root / "scripts" / script, *arguments],
            env={**self.environment, **variables},
            cwd=self.elsewhere,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **variables)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def asked(self) -> list[str]:
        """What was asked of the interpreter and the commands since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def words(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_bash_that_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", ["setup", "quickstart", "test", "check"])
def test_help_names_the_script_and_makes_nothing(checkout: Checkout, script: str) -> None:
    done = checkout.run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{script}" in done.stdout.splitlines()[0]
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("setup", ["now"], 'setup: takes no "now"; see scripts/setup --help'),
        ("check", ["--fx"], 'check: unknown option "--fx"; see scripts/check --help'),
        ("quickstart", ["--fast"], 'quickstart: unknown option "--fast"; see scripts/quickstart --help'),
        ("quickstart", ["--out"], "quickstart: --out needs a value; see scripts/quickstart --help"),
        (
            "quickstart",
            ["--device", "gpus"],
            "quickstart: --device gpus: cpu, gpu or auto would do; see scripts/quickstart --help",
        ),
    ],
)
def test_wrong_argument_is_one_line_and_exit_2(
    checkout: Checkout, script: str, arguments: list[str], message: str
) -> None:
    done = checkout.run(script, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_setup_refuses_an_old_python_in_one_line(checkout: Checkout) -> None:
    old = executable(checkout.elsewhere / "old", "#!/bin/bash\necho 3.10.13\n")
    done = checkout.run("setup", PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr == (
        f"setup: sinktrain needs Python 3.11 or newer, but {old} is 3.10.13; "
        "name one: PYTHON=python3.12 scripts/setup\n"
    )
    assert not (checkout.root / ".venv").exists()


def test_setup_names_a_python_that_does_not_run(checkout: Checkout) -> None:
    done = checkout.run("setup", PYTHON="/no/such/python")
    assert done.returncode == 2
    assert done.stderr == (
        "setup: sinktrain needs Python 3.11 or newer, but /no/such/python does not run; "
        "name one: PYTHON=python3.12 scripts/setup\n"
    )


def test_setup_installs_under_the_pins_and_the_second_run_does_nothing(checkout: Checkout) -> None:
    first = checkout.run("setup", PIP_FIND_LINKS="/wheels /more")
    assert first.returncode == 0, first.stderr
    made, uv, package = checkout.asked()
    assert made == "venv"
    assert uv == "pip -m pip install --quiet -c scripts/constraints.txt uv"
    assert "--constraints scripts/constraints.txt" in package
    assert package.endswith("-e .[dev] find-links=/wheels,/more")

    second = checkout.run("setup")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert checkout.asked() == []


def change_pyproject(checkout: Checkout) -> None:
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# a change\n")


def change_constraints(checkout: Checkout) -> None:
    with (checkout.root / "scripts/constraints.txt").open("a") as file:
        file.write("# a change\n")


def lose_the_command(checkout: Checkout) -> None:
    (checkout.root / ".venv/bin/sinktrain").unlink()


def lose_the_interpreter(checkout: Checkout) -> None:
    (checkout.root / ".venv/bin/python").unlink()


def move_the_folder(checkout: Checkout) -> None:
    checkout.root = checkout.root.rename(checkout.elsewhere / "another place")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_pyproject, ["pip", "uv"]),
        (change_constraints, ["pip", "uv"]),
        (lose_the_command, ["pip", "uv"]),
        (lose_the_interpreter, ["venv", "pip", "uv"]),
        (move_the_folder, ["venv", "pip", "uv"]),
    ],
)
def test_setup_redoes_what_a_change_made_stale(
    checkout: Checkout, change: Callable[[Checkout], None], expected: list[str]
) -> None:
    checkout.run("setup")
    checkout.asked()
    change(checkout)
    done = checkout.run("setup")
    assert done.returncode == 0, done.stderr
    assert words(checkout.asked()) == expected


def test_failed_setup_is_not_taken_for_a_good_one(checkout: Checkout) -> None:
    assert checkout.run("setup", FAKE_FAILS="uv pip").returncode == 1
    checkout.asked()
    assert checkout.run("setup").returncode == 0
    assert words(checkout.asked()) == ["venv", "pip", "uv"]


def test_setup_takes_pip_where_uv_fails(checkout: Checkout) -> None:
    done = checkout.run("setup", FAKE_FAILS="uv")
    assert done.returncode == 0
    assert "setup: uv could not do it; trying pip, which takes longer" in done.stderr
    assert checkout.asked()[-1] == "pip -m pip install --quiet -c scripts/constraints.txt -e .[dev]"


def test_two_setups_at_once_install_once(checkout: Checkout) -> None:
    runs = [checkout.start("setup", FAKE_UV_SECONDS="0.3") for _ in range(2)]
    for run in runs:
        run.communicate(timeout=60)
        assert run.returncode == 0
    assert words(checkout.asked()) == ["venv", "pip", "uv"]


def test_setup_says_that_it_waits_for_another_one(checkout: Checkout) -> None:
    with (checkout.root / "scripts/constraints.txt").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        setup = checkout.start("setup")
        assert setup.stderr is not None
        assert setup.stderr.readline() == "setup: another set-up of this folder is running; waiting for it\n"
        assert checkout.asked() == []
    setup.communicate(timeout=60)
    assert setup.returncode == 0


def test_ctrl_c_ends_setup_without_trying_pip_and_the_next_run_starts_afresh(checkout: Checkout) -> None:
    setup = checkout.start("setup", FAKE_UV_SECONDS="30")
    while not (checkout.log.exists() and "\nuv" in checkout.log.read_text()):
        assert setup.poll() is None
        time.sleep(0.01)
    os.killpg(setup.pid, signal.SIGINT)
    assert "trying pip" not in setup.communicate(timeout=10)[1]
    assert setup.returncode == 130
    checkout.asked()
    assert checkout.run("setup").returncode == 0
    assert words(checkout.asked()) == ["venv", "pip", "uv"]


def test_quickstart_carries_out_the_study_of_its_name(checkout: Checkout) -> None:
    done = checkout.run("quickstart", "--out", "my runs", "--device", "gpu")
    assert done.returncode == 0, done.stderr
    out = checkout.elsewhere / "my runs"
    asked = [line for line in checkout.asked() if line.startswith("sinktrain")]
    compared, studied = asked
    assert compared.startswith(
        "sinktrain compare data/models/vanilla data/models/token --text data/addresses."
    )
    assert compared.endswith(f" --out {out}/pair")
    assert studied == f"sinktrain study quickstart --out {out} --device gpu"
    said = [line for line in done.stdout.splitlines() if line.startswith("said")]
    assert said == ["said by sinktrain compare", "said by sinktrain study"]
    reports = f"{out}/pair/report.html, and of your own two models {out}/compare/report.html"
    assert done.stdout.splitlines()[-1].startswith(f"Reports: {reports} (done in 0 min ")


@pytest.mark.parametrize("failing", ["compare", "study"])
def test_quickstart_ends_with_the_exit_code_of_what_failed(checkout: Checkout, failing: str) -> None:
    done = checkout.run("quickstart", FAKE_FAILS=failing)
    assert done.returncode == 7
    assert "Report" not in done.stdout


def test_check_says_nothing_when_all_is_well(checkout: Checkout) -> None:
    checkout.run("setup")
    checkout.asked()
    done = checkout.run("check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert checkout.asked() == ["ruff check", "ruff format --check", "mypy ", "lint-imports "]


def test_check_shows_what_failed_and_runs_the_rest(checkout: Checkout) -> None:
    checkout.run("setup")
    checkout.asked()
    done = checkout.run("check", FAKE_FAILS="format")
    assert (done.returncode, done.stdout) == (1, "said by ruff format\n")
    assert words(checkout.asked()) == ["ruff", "ruff", "mypy", "lint-imports"]


def test_test_passes_its_options_to_pytest(checkout: Checkout) -> None:
    done = checkout.run("test", "-k", "resume or stream")
    assert done.returncode == 0, done.stderr
    assert checkout.asked()[-1] == "-m pytest -n 2 --dist loadfile -k resume or stream"


def requirements() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    for lines in (project["build-system"]["requires"], project["project"]["dependencies"], *extras):
        yield from map(Requirement, lines)


def test_every_requirement_has_a_pin_that_meets_it() -> None:
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(pin.name): pin
        for pin in map(Requirement, filter(None, (line.partition("#")[0] for line in lines)))
    }
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins.values())
    for requirement in requirements():
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="), prereleases=True), (
            requirement
        )


@pytest.mark.parametrize(("name", "num_marks"), [("shakespeare", 42), ("addresses", 2)])
def test_shipped_text_is_the_one_its_readme_describes(name: str, num_marks: int) -> None:
    packed = (ROOT / f"data/{name}.txt.xz").read_bytes()
    text = lzma.decompress(packed)
    readme = (ROOT / "data/README.md").read_text()
    assert len(packed) <= 2_000_000
    for content in (packed, text):
        assert f"{len(content):,} bytes" in readme
        assert hashlib.sha256(content).hexdigest() in readme
    lines = text.decode("ascii").splitlines()
    assert sum("<|doc|>" in line for line in lines) == lines.count("<|doc|>") == num_marks
    assert not re.search(r"gutenberg|all rights reserved|\(c\)|https?:", text.decode(), re.IGNORECASE)
