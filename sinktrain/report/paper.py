"""The paper's own figures, to be shown beside ours."""

from __future__ import annotations

import math

from sinktrain.report.table import Table
from sinktrain.report.wording import perplexity_text

CITATION = "StreamingLLM, arXiv 2309.17453, Table 3 and Table 10; 160m, 75B tokens, one PG19 book, one seed"
"""Where the figures come from; 75B is computed: 143,000 steps of 256 samples of 2048 tokens."""

LAYOUTS = ("0+1024", "1+1023", "2+1022", "4+1020")
PERPLEXITIES = {
    "vanilla": (27.87, 18.49, 18.05, 18.05),
    "zero sink": (29214.0, 19.90, 18.27, 18.01),
    "one sink token": (1235.0, 18.01, 18.01, 18.02),
    "two sink tokens": (1262.0, 25.73, 18.05, 18.05),
}
"""Of each model, in the order of ``LAYOUTS``. Counted in the authors' way, whose 1+1023 sees one key more."""


def paper_table() -> Table:
    """The paper's perplexities, and in nats what the first slots are worth there."""
    return Table(
        [
            "in the paper",
            *LAYOUTS,
            f"{LAYOUTS[0]} - {LAYOUTS[1]}, nats",
            f"{LAYOUTS[0]} - {LAYOUTS[3]}, nats",
        ],
        [
            [
                model,
                *map(perplexity_text, row),
                *(f"{math.log(row[0] / kept):+.3f}" for kept in (row[1], row[3])),
            ]
            for model, row in PERPLEXITIES.items()
        ],
    )
