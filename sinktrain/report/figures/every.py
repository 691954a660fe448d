"""All plots of a report at once."""

from __future__ import annotations

from collections.abc import Iterator

from sinktrain.report.figures import differences, heat, inside, losses, quantized, streams, training
from sinktrain.report.figures.look import TEMPLATE, Spec, coloured
from sinktrain.report.figures.source import all_texts, drawn_models
from sinktrain.report.figures.spec import Figure
from sinktrain.report.style import LIGHT
from sinktrain.report.wording import Results


def every_figure(results: Results) -> Iterator[Figure]:
    """In the order of the page."""
    for make in (
        losses.loss_figures,
        differences.seed_figures,
        differences.model_figures,
        differences.policy_figures,
        losses.position_figures,
        differences.gap_figures,
        streams.removal_figures,
        quantized.quantized_figures,
    ):
        for text in all_texts(results):
            yield from make(results, text)
    yield from inside.metric_figures(results)
    for model in results["models"]:
        if model["name"] in drawn_models(results):
            yield from heat.heat_figures(results, model)
    yield from inside.norm_figures(results)
    yield from streams.recall_figures(results)
    yield from streams.cost_figures(results)
    yield from training.training_figures(results)


def all_figures(results: Results) -> dict[str, Spec]:
    """Plots by name as plotly takes them anywhere: template and all, in the colours of light paper."""
    return {
        figure.name: coloured(
            {"data": figure.traces, "layout": {**figure.layout, "template": TEMPLATE}}, LIGHT
        )
        for figure in every_figure(results)
    }
