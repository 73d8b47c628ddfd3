"""SVG of whole workloads, ours beside other engines; see `isobatch plot`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from isobatch.cli.svg import COLORS, INK, identifier, measured, svg

_STOCK = "torch's kernels, same engine"
_BAR = 0.8  # of a workload's place, shared by its engines


def _workloads(report: dict[str, Any]) -> str:
    """Each engine's time over ours, and the floor as a line."""
    points = report["points"]
    times = {"isobatch": [point["seconds"] for point in points]}
    if all("stock_s" in point for point in points):
        times[_STOCK] = [point["stock_s"] for point in points]
    for engine in report.get("beside", ()):
        times[engine] = [point["beside"][engine]["seconds"] for point in points]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title(f"{measured(report)}: time over isobatch's")
        height, ours = _BAR / len(times), times["isobatch"]
        for turn, ((engine, seconds), color) in enumerate(zip(times.items(), COLORS, strict=False)):
            at = [row - _BAR / 2 + (turn + 0.5) * height for row in range(len(points))]
            over = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
            bars = axes.barh(at, over, height * 0.9, color=color, label=engine)
            for bar, workload in zip(bars, points, strict=True):
                bar.set_gid(identifier(f"{engine}-{workload['workload']}"))
            axes.bar_label(bars, [f"{value:.2f} s" for value in seconds], padding=3, fontsize=9, color=INK)
        floors = [point["floor_s"] / point["seconds"] for point in points]
        ends = [row + sign * _BAR / 2 for row in range(len(points)) for sign in (-1, 1)]
        axes.vlines(floors, ends[::2], ends[1::2], color=INK, label="floor", gid="floor")
        axes.set_yticks(range(len(points)), [point["workload"].replace(", ", "\n") for point in points])
        axes.invert_yaxis()
        axes.tick_params(left=False)
        axes.margins(x=0.1)
        handles, labels = axes.get_legend_handles_labels()  # lines come first
        figure.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], loc="outside lower center", ncols=3)

    return svg(draw, (8, 1.2 + len(points) * (0.3 + 0.22 * len(times))))


PLOTS: dict[str, Callable[[dict[str, Any]], str | None]] = {"serve-workloads.svg": _workloads}
"""As of `step_plots`."""
