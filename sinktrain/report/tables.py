"""The tables of a report, gathered from their modules."""

from sinktrain.report.loss_tables import (
    bits_table,
    difference_table,
    measurement_table,
    perplexity_cell,
    perplexity_cells,
    perplexity_table,
    removal_table,
)
from sinktrain.report.markdown import results_markdown
from sinktrain.report.paper import paper_table
from sinktrain.report.probe_tables import (
    latency_table,
    norms_table,
    sink_table,
    streameval_table,
    verified_table,
)
from sinktrain.report.setting_tables import environment_table, model_table, sink_words
from sinktrain.report.table import COLUMN_GAP, Table
from sinktrain.report.terminal import terminal_table

__all__ = [
    "COLUMN_GAP",
    "Table",
    "bits_table",
    "difference_table",
    "environment_table",
    "latency_table",
    "measurement_table",
    "model_table",
    "norms_table",
    "paper_table",
    "perplexity_cell",
    "perplexity_cells",
    "perplexity_table",
    "removal_table",
    "results_markdown",
    "sink_table",
    "sink_words",
    "streameval_table",
    "terminal_table",
    "verified_table",
]
