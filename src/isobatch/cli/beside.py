"""Times of other engines on the workloads of `isobatch bench serve`, read from files and set beside ours.

Another engine takes the GPU's memory and has settings of a whole process, so it is measured in one of its
own, which leaves a file: `scripts/serve_vllm.py` does so for vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from isobatch.cli.goals import Point, geometric_mean
from isobatch.cli.workloads import MODEL, WORKLOADS
from isobatch.errors import ConfigError
from isobatch.models.presets import preset


@dataclass(frozen=True, slots=True)
class Side:
    """Another engine in one of its modes.

    Args:
        name: such as "vllm default".
        seconds: by workload; possibly not of all.
        report: everything in the file but the points: where it comes from, with which settings.
    """

    name: str
    seconds: dict[str, float]
    report: dict[str, Any]


def read(paths: Sequence[Path], gpu: str | None) -> list[Side]:
    """The sides that files hold, each found to have been asked what we are asked, on the GPU that we have.

    Args:
        paths: files of `scripts/serve_vllm.py`.
        gpu: what the GPU of this machine calls itself.

    Raises:
        ConfigError: no such file, or none of that script; another model, GPU or workload than ours; one side
            more than once.
    """
    sides = [_side(path, gpu) for path in paths]
    names = [side.name for side in sides]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            "--beside: one side more than once",
            expected="a file for each engine and mode",
            got=f"{names.count(twice)} files of {twice}",
            fix="name only the one to compare with",
        )
    return sides


def _side(path: Path, gpu: str | None) -> Side:
    def refused(what: str, expected: object, got: object, fix: str) -> ConfigError:
        return ConfigError(f"--beside {path}: {what}", expected=expected, got=got, fix=fix)

    again = "run scripts/serve_vllm.py again, from this version and on this machine"
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        name = f"{file['engine']} {file['mode']}"
        model, their_gpu = file["model"], file["provenance"]["hardware"].get("gpu")
        points = {point["workload"]: (point["asks"], float(point["seconds"])) for point in file.pop("points")}
    except OSError as error:
        raise refused(
            "cannot be read", "a file of scripts/serve_vllm.py", error.strerror, "look at the path"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refused("not such a file", "what scripts/serve_vllm.py writes", got, again) from error
    if model != MODEL:
        raise refused("another model", MODEL, model, again)
    if their_gpu != gpu:
        raise refused("another GPU", gpu or "none", their_gpu or "none", again)
    if not points:
        raise refused("nothing was measured", "a workload or more", "none", again)
    ours = {workload.name: workload for workload in WORKLOADS}
    for workload, (asks, seconds) in points.items():
        if workload not in ours:
            raise refused("a workload that we do not have", f"one of {', '.join(ours)}", workload, again)
        if asks != (wanted := ours[workload].digest(preset(MODEL).vocabulary)):
            raise refused(f"{workload}: other requests than ours", wanted, asks, again)
        if not (seconds > 0 and math.isfinite(seconds)):
            raise refused(f"{workload}: no time", "more than 0 seconds", seconds, again)
    return Side(name, {workload: seconds for workload, (_, seconds) in points.items()}, file)


def merged(report: dict[str, Any], sides: Sequence[Side]) -> dict[str, Any]:
    """A report of `isobatch bench serve`, with the other sides in it.

    Args:
        report: ours.
        sides: as `read` gives them.

    Returns:
        The report; each point also has, by side, "beside": its seconds and the ratio, and the report has, by
        side, what is in its file and the geometric mean of the ratios. Above 1 isobatch is faster.
    """
    points = [{**point, "beside": _beside(point, sides)} for point in report["points"]]
    beside: dict[str, dict[str, Any]] = {}
    for side in sides:
        ratios = [point["beside"][side.name]["ratio"] for point in points if side.name in point["beside"]]
        beside[side.name] = {"geometric_mean": geometric_mean(ratios) if ratios else None, **side.report}
    return {**report, "points": points, "beside": beside}


def _beside(point: Point, sides: Sequence[Side]) -> dict[str, dict[str, float]]:
    return {
        side.name: {"seconds": seconds, "ratio": seconds / point["seconds"]}
        for side in sides
        if (seconds := side.seconds.get(point["workload"])) is not None
    }


def table(report: dict[str, Any]) -> Table:
    """A row for each workload, and two columns for each side: seconds, and the ratio.

    Args:
        report: as `merged` gives it.
    """
    found = Table(title="seconds; ratio above 1: isobatch is faster")
    found.add_column("")
    for heading in ("isobatch", *(column for name in report["beside"] for column in (name, "ratio"))):
        found.add_column(heading, justify="right")
    for point in report["points"]:
        cells = []
        for name in report["beside"]:
            theirs = point["beside"].get(name)
            cells += [f"{theirs['seconds']:.2f}", f"{theirs['ratio']:.2f}"] if theirs else ["", ""]
        found.add_row(point["workload"], f"{point['seconds']:.2f}", *cells)
    means = ["geometric mean", ""]
    for side in report["beside"].values():
        mean = side["geometric_mean"]
        means += ["", "" if mean is None else f"{mean:.2f}"]
    found.add_row(*means)
    return found
