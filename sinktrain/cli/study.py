"""``sinktrain study``: arms x seeds, trained alike, then compared."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinktrain.cli.parsing import Parser, make_parser, number_list
from sinktrain.cli.printing import print_json
from sinktrain.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from sinktrain.experiments.study_commands import Options
    from sinktrain.experiments.study_file import Study

ABOUT = """\
Train every arm of a study under every seed, then compare them. What is finished is not trained again,
what was cut off continues, and a run that fails stops no other. With several GPUs, a run each. A run whose
recipe has changed is trained anew, and its former self moved to former/.

STUDY is a file, or the name of a shipped study:
{shipped}
A study names a base config, arms (what is laid over it), seeds, a text, and what is measured:

  text: book.txt                  # prepared with the options of `prepare`; or  shards: DIR
  prepare: {{vocab_size: 4096}}
  base: [small]                   # configs of sinktrain fit
  settings: {{trainer: {{max_steps: 4000}}}}
  arms:
    vanilla: {{}}
    sink: {{config: sink}}
    zero: {{model: {{sink: {{kind: zero}}}}}}
  seeds: [1, 2, 3]
  compare: {{layouts: 128, max_tokens: 500000, streams: 16}}

All lands in --out: shards/, a run folder each, compare/ (results.json, results.md, report.html), logs/."""


def study(arguments: list[str]) -> int:
    from sinktrain.experiments.study_file import read_study

    options = _parser().parse_args(arguments)
    from sinktrain.experiments.study import chosen_runs, run_study
    from sinktrain.experiments.study_commands import STAGES, Options

    found = read_study(options.study)
    chosen = Options(
        out=options.out or Path("runs", found.name),
        stages=_stages(options.stages, STAGES),
        only=_words(options.only),
        seeds=tuple(number_list("--seeds", options.seeds)) if options.seeds else (),
        accelerator=options.device,
        gpus_per_run=_gpus(options.gpus_per_run),
        text=options.text,
    )
    if options.dry_run:
        from sinktrain.experiments.study_plan import as_table, plan_study

        rows = plan_study(found, chosen_runs(found, chosen), chosen)
        if options.json:
            print_json([asdict(row) for row in rows])
        else:
            print(as_table(rows))
        return 0
    from sinktrain.experiments.study_pool import StudyStopped

    try:
        if options.launcher == "slurm":
            _submit(found, chosen, options)
        else:
            run_study(found, chosen)
    except StudyStopped as stopped:
        print(f"sinktrain study: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    if options.json:
        print_json({"out": chosen.out, "runs": [run.name for run in chosen_runs(found, chosen)]})
    return 0


def _parser() -> Parser:
    from sinktrain.experiments.study_file import shipped_studies

    shipped = "\n".join(f"  {name:<18} {_about(path)}" for name, path in shipped_studies().items())
    parser = make_parser(
        "study",
        ABOUT.format(shipped=shipped + "\n"),
        "sinktrain study quickstart\n"
        "  sinktrain study ten-minutes-h100 --text books/ --dry-run\n"
        "  sinktrain study my.yaml --only sink,zero --seeds 1,2",
    )
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument("--out", type=Path, metavar="DIR", help="its folder (default: runs/ and its name)")
    parser.add_argument("--only", metavar="ARM,…", help="train these arms alone")
    parser.add_argument("--seeds", metavar="N,…", help="train these seeds alone, of the study's")
    parser.add_argument("--text", metavar="TEXT", help="train on this in place of the study's text")
    parser.add_argument(
        "--device", choices=["cpu", "gpu", "auto"], help="what to train on (default: as the configs say)"
    )
    parser.add_argument(
        "--gpus-per-run", default="1", metavar="N", help="GPUs that a run trains on, or all (default: 1)"
    )
    parser.add_argument(
        "--stages", default="", metavar="S,…", help="of prepare, train, compare, publish (default: all)"
    )
    parser.add_argument(
        "--launcher", choices=["local", "slurm"], default="local", help="slurm: an array job, a task a run"
    )
    parser.add_argument("--dry-run", action="store_true", help="print tokens, hours and disk; do nothing")
    return parser


def _about(path: Path) -> str:
    """The first line of a study's comment."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _words(typed: str | None) -> tuple[str, ...]:
    return tuple(word for word in (typed or "").split(",") if word)


def _stages(typed: str, known: tuple[str, ...]) -> tuple[str, ...]:
    for stage in _words(typed):
        if stage not in known:
            raise ConfigError(f"--stages {stage}{did_you_mean(stage, known)}; there are {', '.join(known)}")
    return _words(typed) or known


def _gpus(typed: str) -> int:
    if typed != "all" and not (typed.isdigit() and int(typed)):
        raise ConfigError(f"--gpus-per-run {typed}; use a number from 1 on, or all")
    return 0 if typed == "all" else int(typed)


def _submit(found: Study, chosen: Options, options: argparse.Namespace) -> None:
    """Prepare here, since all tasks read the shards; the rest in jobs."""
    from sinktrain.experiments.study import chosen_runs, missing_runs, run_study
    from sinktrain.experiments.study_commands import SINKTRAIN
    from sinktrain.experiments.study_slurm import submit

    if not chosen.gpus_per_run:
        raise ConfigError("--gpus-per-run all: SLURM asks how many; write it like --gpus-per-run 8")
    run_study(found, replace(chosen, stages=tuple(stage for stage in chosen.stages if stage == "prepare")))
    command = [*SINKTRAIN, "study", options.study, "--out", str(chosen.out)]
    for option, typed in (
        ("--text", options.text),
        ("--device", options.device),
        ("--gpus-per-run", options.gpus_per_run),
    ):
        command += [option, typed] if typed else []
    runs = missing_runs(found, chosen_runs(found, chosen), chosen) if "train" in chosen.stages else []
    rest = [stage for stage in chosen.stages if stage in ("compare", "publish")]
    num_gpus = 0 if chosen.accelerator == "cpu" else chosen.gpus_per_run
    jobs = submit(found.name, command, runs, rest, num_gpus, chosen.out)
    print(f"submitted as jobs {' and '.join(jobs)}; watch {chosen.out / 'logs'}")
