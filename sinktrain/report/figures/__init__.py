"""Plots as plain values: each number in them names the row of the results it stands in."""

from sinktrain.report.figures.every import all_figures, every_figure

__all__ = ["all_figures", "every_figure"]
