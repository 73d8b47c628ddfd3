"""How `isobatch plot` draws: as SVG that fits into any page.

The background is left open and every colour stands out from white as from GitHub's dark page, so that one
file does for both. Text stays text. Nothing in a file depends on when or where it was drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#7b7b7b"
COLORS = (
    "#3f7fc4",
    "#cf6a1a",
    "#2f9158",
    "#b65fc4",
    "#9c7a1e",
    "#d4515d",
    "#1f8f9e",
    "#8a76d6",
    "#7d8a2a",
    "#7b7b7b",
)
"""Of series, and of kinds of work in their order."""
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "isobatch",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def measured(report: dict[str, Any]) -> str:
    """What was measured, and on what.

    Args:
        report: of a bench, with its provenance.
    """
    gpu = report["provenance"]["hardware"].get("gpu", "an unknown GPU")
    return f"{report['model']} on {gpu}"


def identifier(label: str) -> str:
    """What a part of the drawing is called in the file.

    Args:
        label: as the reader has it.
    """
    return label.replace(", ", "-").replace(" ", "-")


def svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    """What `draw` draws.

    Args:
        draw: given the empty figure.
        size: width and height, in inches.
    """
    out = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
