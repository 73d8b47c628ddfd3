"""SVG of what a decode step costs and where its time goes; see `isobatch plot`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from isobatch.cli.goals import Point
from isobatch.cli.step_profile import KERNELS
from isobatch.cli.svg import COLORS, INK, identifier, measured, svg
from isobatch.cli.workloads import CONTEXT, FEW

_LABELLED = 0.04  # a narrower part of a bar has no room for a number


def _by_batch(report: dict[str, Any]) -> str | None:
    points = [point for point in report.get("points", ()) if point["context"] == CONTEXT]
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"{measured(report)}: one decode step, {CONTEXT} tokens of context", "batch")
        _series(axes, points, "batch", "step", COLORS[0])

    return svg(draw, (7, 4.5))


def _by_context(report: dict[str, Any]) -> str | None:
    series = {b: [point for point in report.get("points", ()) if point["batch"] == b] for b in FEW}
    if not any(series.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"{measured(report)}: one decode step", "context, tokens")
        for color, (batch, points) in zip(COLORS, series.items(), strict=False):
            _series(axes, points, "context", f"batch {batch}", color)

    return svg(draw, (7, 4.5))


def _profiles(report: dict[str, Any]) -> str | None:
    profiles = report.get("profiles")
    if not profiles:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title(f"{measured(report)}: where the time of a decode step goes")
        axes.set_xlabel("percent of the step")
        axes.set_xlim(0, 100)
        for row, one in enumerate(profiles):
            _bar(axes, row, one)
        names = [f"batch {one['batch']}\n{one['us'] / 1e3:.2f} ms" for one in profiles]
        axes.set_yticks(range(len(profiles)), names)
        axes.invert_yaxis()
        axes.tick_params(left=False)
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        kinds = [kind for kind in KERNELS if kind in once]
        figure.legend([once[kind] for kind in kinds], kinds, loc="outside lower center", ncols=3)

    return svg(draw, (8, 2.2 + 0.8 * len(profiles)))


PLOTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "step-by-batch.svg": _by_batch,
    "step-by-context.svg": _by_context,
    "step-profile.svg": _profiles,
}
"""From a report to an SVG, None where it lacks what the plot would show; by the name of the file."""


def _axes(figure: Figure, title: str, quantity: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)  # a step of the largest batch takes a few times that of one: no decade
    plain = FuncFormatter(lambda value, _place: f"{value:,.6g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.set_xlabel(quantity)
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.25, color=INK)
    return axes


def _series(axes: Axes, points: list[Point], quantity: str, name: str, color: str) -> None:
    """Times with markers, and their floor as a dashed line of the same colour."""
    points = sorted(points, key=lambda point: point[quantity])
    x = [point[quantity] for point in points]
    for label, key, look in ((name, "us", "o-"), (f"{name}, floor", "floor_us", ".--")):
        y = [point[key] / 1e3 for point in points]
        axes.plot(x, y, look, color=color, label=label, gid=identifier(label))
    axes.legend()


def _bar(axes: Axes, row: int, profile: dict[str, Any]) -> None:
    """A bar of all kinds of work, each labelled where there is room."""
    left, colors = 0.0, dict(zip(KERNELS, COLORS, strict=True))
    for kind in profile["kinds"]:
        share = 100 * kind["share"]
        (part,) = axes.barh(row, share, 0.6, left, color=colors[kind["kind"]], label=kind["kind"])
        part.set_gid(identifier(f"batch-{profile['batch']}-{kind['kind']}"))
        if kind["share"] >= _LABELLED:
            axes.text(left + share / 2, row, f"{share:.0f}", color="white", ha="center", va="center")
        left += share
