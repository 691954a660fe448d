"""How plots look: one template for all of them, and how the series of a plot are told apart.

Colours are the page's own names, ``var(--s0)``; page.js looks them up, so that light and dark are one plot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinktrain.report.wording import Results

Spec = dict[str, Any]

NUM_COLOURS = 6
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INK, SOFT, HAIR = "var(--ink)", "var(--soft)", "var(--hair)"

_CLEAR = "rgba(0,0,0,0)"
_AXIS: Spec = {
    "title": {"standoff": 8, "font": {"size": 12}},
    "automargin": True,
    "gridcolor": HAIR,
    "linecolor": SOFT,
    "showline": True,
    "zeroline": False,
    "zerolinecolor": SOFT,
    "zerolinewidth": 1,
    "ticks": "outside",
    "tickcolor": SOFT,
    "ticklen": 4,
}

TEMPLATE: Spec = {
    "layout": {
        "margin": {"l": 8, "r": 12, "t": 26, "b": 8},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {
            "family": 'system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif',
            "size": 12,
            "color": INK,
        },
        "hoverlabel": {
            "bgcolor": "var(--tint)",
            "bordercolor": HAIR,
            "font": {"color": INK},
            "align": "left",
        },
        "modebar": {"bgcolor": _CLEAR, "color": SOFT, "activecolor": INK},
        "hovermode": "closest",
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "maxheight": 1000,  # pixels; page.js makes room for all of it
        },
        "coloraxis": {"colorbar": {"thickness": 8, "outlinewidth": 0, "ticklen": 3, "tickcolor": SOFT}},
        "annotationdefaults": {"showarrow": False, "font": {"size": 11, "color": SOFT}},
        "shapedefaults": {
            "line": {"color": SOFT, "width": 1, "dash": "dot"},
            "label": {"font": {"size": 10, "color": SOFT}, "padding": 1},
        },
    },
    "data": {
        "scatter": [
            {
                "marker": {"size": 8},
                "line": {"width": 1.6},
                "error_x": {"thickness": 1.6, "width": 4},
                "error_y": {"thickness": 1.6, "width": 4},
            }
        ],
        "heatmap": [{"xgap": 1, "ygap": 1}],
    },
}


@dataclass(frozen=True)
class Look:
    """How a series is told apart: by colour, and without any colour by symbol and dash."""

    colour: str
    symbol: str
    dash: str

    @classmethod
    def of(cls, series: int) -> Look:
        other = (series + series // NUM_COLOURS) % NUM_COLOURS  # colours come again, with another symbol
        return cls(f"var(--s{series % NUM_COLOURS})", SYMBOLS[other], DASHES[other])


def model_looks(results: Results) -> Mapping[str, Look]:
    """A look for each model, the same in all plots."""
    return {model["name"]: Look.of(series) for series, model in enumerate(results["models"])}


def coloured(value: Any, colours: Mapping[str, str]) -> Any:
    """The page's colour names anywhere in a plot as colours, as page.js does it."""
    if isinstance(value, str) and value.startswith("var(--"):
        return colours[value.removeprefix("var(--").removesuffix(")")]
    if isinstance(value, Mapping):
        return {name: coloured(entry, colours) for name, entry in value.items()}
    return [coloured(entry, colours) for entry in value] if isinstance(value, list) else value
