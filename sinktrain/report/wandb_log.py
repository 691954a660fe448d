"""A comparison as a run of Weights & Biases: the tables with all their numbers, the plots, the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sinktrain.errors import ConfigError, first_line
from sinktrain.report.contests import main_pairs
from sinktrain.report.figures import all_figures
from sinktrain.report.findings import texts, verdict_sentences
from sinktrain.report.probe_tables import sink_rows
from sinktrain.report.wording import Results, Row, layout_name, pair_words

ARTIFACT = "streaming-comparison"


def check_wandb(project: str) -> None:
    """Raise ConfigError if wandb is not installed: to be known before hours of measuring."""
    if find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb {project} needs the package wandb; pip install 'sinktrain[wandb]', or leave it out"
        )


def log_report(results: Results, out: Path, project: str) -> None:
    """Log a written report to a new run.

    Args:
        out: folder of ``results.json`` and ``report.html``; wandb's own files go there too.
        project: of wandb, made if it is not there yet.

    Raises:
        ConfigError: wandb is not installed, or refuses the run.
    """
    check_wandb(project)
    import wandb

    try:
        with wandb.init(
            project=project,
            name=out.resolve().name,
            job_type="compare",
            dir=str(out),
            config={"environment": results["environment"], "models": results["models"]},
        ) as run:
            run.log(
                {
                    **{f"tables/{name}": _wandb_table(wandb, rows) for name, rows in filled_lists(results)},
                    **{
                        f"plots/{name}": _wandb_plot(wandb, spec)
                        for name, spec in all_figures(results).items()
                    },
                    "report": wandb.Html(str(out / "report.html"), inject=False),
                }
            )
            run.summary.update(summary_numbers(results))
            artifact = wandb.Artifact(ARTIFACT, type="results")
            artifact.add_file(str(out / "results.json"))
            run.log_artifact(artifact)
    except wandb.errors.Error as error:
        raise ConfigError(
            f"--wandb {project}: wandb refused the run ({first_line(error)}); "
            "run wandb login, or set WANDB_MODE=offline; the report itself is written"
        ) from None


def filled_lists(results: Results) -> Iterator[tuple[str, list[Row]]]:
    """The lists of ``results.json`` that hold something, as rows of plain values.

    ``ci95`` becomes the columns ``ci95.0`` and ``ci95.1``, ``sink`` becomes ``sink.kind``, …;
    ``position_loss`` has a row for each stream position.
    """
    for name, rows in results.items():
        if isinstance(rows, list) and rows:
            rows = [point for row in rows for point in _points(row)] if name == "position_loss" else rows
            yield name, [dict(_flat(row)) for row in rows]


def _points(row: Row) -> Iterator[dict[str, Any]]:
    for stream_pos, loss_nats in zip(row["stream_pos"], row["loss_nats"], strict=True):
        yield {**row, "stream_pos": stream_pos, "loss_nats": loss_nats}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def summary_numbers(results: Results) -> dict[str, Any]:
    """The verdict, and the numbers that runs are compared by."""
    numbers: dict[str, Any] = {"verdict": " ".join(verdict_sentences(results))}
    for row in results["perplexity"]:
        numbers[f"perplexity/{row['text']}/{row['model']}/{layout_name(row)}"] = row["perplexity"]
    for text in texts(results):
        for pair in main_pairs(results, text):
            models, layouts = pair_words(pair)
            numbers[f"difference_nats/{text}/{models}/{layouts}"] = pair["delta_nats"]
    for row in sink_rows(results):
        numbers[f"sink_metric/{row['model']}/{row['position']}"] = row["value"]
    return numbers


def _wandb_table(wandb: Any, rows: Iterable[Row]) -> Any:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])


def _wandb_plot(wandb: Any, spec: Mapping[str, Any]) -> Any:
    from plotly.graph_objects import Figure

    return wandb.Plotly(Figure(spec))
