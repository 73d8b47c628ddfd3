"""`isobatch plot`: draws what `isobatch bench serve` measured, its steps or its workloads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_FILE = Path("benchmarks/results/serve-steps.json")
_MEASURE = "isobatch bench serve --only steps"
_WORKLOADS = "isobatch bench serve"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "plot",
        help=f"draw what {_WORKLOADS} measured",
        description=f"Draws, of {_MEASURE}, the time of a decode step against batch and context, with its "
        f"floor, and where the time goes; of {_WORKLOADS}, the time of each workload beside other engines'. "
        "SVG; equal results give equal files. Needs the extra [plots].",
    )
    parser.add_argument("file", nargs="?", type=Path, default=_FILE, help=f"results (default {_FILE})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to draw (default: beside the file)")


def run(arguments: argparse.Namespace) -> int:
    """Draws what the file has.

    Returns:
        0.

    Raises:
        ConfigError: no such file, or none of this bench; or it lacks a part, and the rest has been drawn.
        MissingDependencyError: matplotlib is not installed.
    """
    from isobatch.errors import ConfigError, MissingDependencyError

    try:
        from isobatch.cli import serve_plots, step_plots
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is not installed", fix="pip install isobatch[plots]"
        ) from error
    path: Path = arguments.file
    report = _read(path)
    folder = arguments.out or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    plots, measure = (serve_plots.PLOTS, _WORKLOADS) if _whole(report) else (step_plots.PLOTS, _MEASURE)
    lacking = []
    for name, plot in plots.items():
        try:
            svg = plot(report)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{path}: not of this version",
                expected=f"what `{measure}` writes",
                got=got,
                fix="run it again",
            ) from error
        if svg is None:
            lacking.append(name)
            continue
        (folder / name).write_text(svg, encoding="utf-8")
        print(folder / name)
    if lacking:
        raise ConfigError(
            f"{path} lacks what {' and '.join(lacking)} would show",
            got="; ".join(f"{one['what']}: {one['why']}" for one in report.get("left_out", ())) or None,
            fix=f"run `{_MEASURE}`",
        )
    return 0


def _whole(report: dict[str, Any]) -> bool:
    """Whether these are workloads; what is neither is found out when it is drawn."""
    points = report.get("points")
    return isinstance(points, list) and any(isinstance(one, dict) and "workload" in one for one in points)


def _read(path: Path) -> dict[str, Any]:
    from isobatch.errors import ConfigError

    fix = f"run `{_MEASURE}` on a GPU, or name its results"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no results at {path}", got=error.strerror, fix=fix) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no results file", expected="JSON", got=str(error), fix=fix) from error
    if not isinstance(report, dict):
        raise ConfigError(f"{path} is no results file", got=type(report).__name__, fix=fix)
    return report
