"""`isobatch plot`: what it draws is read from the SVG. Figures are made up here."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from isobatch.cli import main, serve_plots, step_plots, svg
from isobatch.cli.workloads import BATCHES, CONTEXTS, FEW

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
KINDS = (("linear", 0.62), ("attention", 0.3), ("sampling", 0.05), ("idle", 0.03))


def point(batch: int, context: int) -> dict[str, Any]:
    us = 4000 + 0.02 * batch * context
    return {"batch": batch, "context": context, "us": us, "floor_us": us / 1.25}


def report() -> dict[str, Any]:
    spots = [(b, 256) for b in BATCHES] + [(b, c) for b in FEW for c in CONTEXTS if b * c <= 1 << 18]
    kinds = [{"kind": kind, "us": 4600 * share, "share": share} for kind, share in KINDS]
    return {
        "provenance": {"hardware": {"gpu": "NVIDIA H999"}},
        "model": "tiny",
        "points": [point(*spot) for spot in spots],
        "profiles": [{"batch": batch, "us": 4600.0, "kinds": kinds} for batch in (1, 1000)],
        "left_out": [],
    }


def served() -> dict[str, Any]:
    """Of workloads: each engine's time is a multiple of ours."""
    points = [
        {
            "workload": name,
            "seconds": ours,
            "stock_s": 1.1 * ours,
            "floor_s": 0.8 * ours,
            "beside": {"vllm default": {"seconds": 1.25 * ours}, "vllm slow": {"seconds": 4 * ours}},
        }
        for name, ours in (("1 x 128 in, 256 out", 1.5), ("8 x 6000 in, 64 out", 3.25))
    ]
    hardware = {"hardware": {"gpu": "NVIDIA H999"}}
    return {
        "provenance": hardware,
        "model": "tiny",
        "points": points,
        "beside": {"vllm default": {}, "vllm slow": {}},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve-steps.json"
    path.write_text(json.dumps(report()))
    return path


def drawn(folder: Path, name: str) -> ElementTree.Element:
    return ElementTree.parse(folder / name).getroot()


def group(root: ElementTree.Element, gid: str) -> ElementTree.Element:
    (found,) = (element for element in root.iter(f"{SVG}g") if element.get("id") == gid)
    return found


def ends(root: ElementTree.Element, gid: str) -> tuple[float, float]:
    """Of a bar, from left to right."""
    path = next(group(root, gid).iter(f"{SVG}path"))
    xs = [float(number) for number in re.findall(r"[ML] (\S+) \S+", path.get("d", ""))]
    return min(xs), max(xs)


def markers(root: ElementTree.Element, gid: str) -> list[tuple[float, float]]:
    uses = group(root, gid).iter(f"{SVG}use")
    return [(float(use.get("x", "nan")), float(use.get("y", "nan"))) for use in uses]


def said(root: ElementTree.Element) -> str:
    return "\n".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))


def expect_logarithmic(
    places: list[tuple[float, float]], points: list[dict[str, Any]], quantity: str
) -> None:
    """Places on both axes are proportional to logarithms of the figures."""
    assert len(places) == len(points)
    for axis, values in enumerate(([p[quantity] for p in points], [p["us"] for p in points])):
        first, last = places[0][axis], places[-1][axis]
        whole = math.log(values[-1] / values[0])
        for place, value in zip(places, values, strict=True):
            share = math.log(value / values[0]) / whole
            assert place[axis] == pytest.approx(first + (last - first) * share, abs=0.01)


def test_every_point_and_its_floor_is_where_it_belongs(file: Path) -> None:
    assert main(["plot", str(file)]) == 0
    root = drawn(file.parent, "step-by-batch.svg")
    expect_logarithmic(markers(root, "step"), [point(batch, 256) for batch in BATCHES], "batch")
    above, below = markers(root, "step"), markers(root, "step-floor")
    assert [x for x, _ in above] == [x for x, _ in below]
    down = {round(floor - step, 3) for (_, step), (_, floor) in zip(above, below, strict=True)}
    assert max(down) - min(down) < 0.01, "a floor that is 1.25 times less lies the same way below"
    assert min(down) > 0
    assert {"4", "8"} <= set(said(root).splitlines()), "the axis of times has numbers"
    root = drawn(file.parent, "step-by-context.svg")
    for batch in FEW:
        contexts = sorted({256, *(c for c in CONTEXTS if batch * c <= 1 << 18)})
        expect_logarithmic(markers(root, f"batch-{batch}"), [point(batch, c) for c in contexts], "context")
        assert len(markers(root, f"batch-{batch}-floor")) == len(contexts)
    assert "tiny on NVIDIA H999" in said(root)
    assert "131,072" in said(root)


def test_parts_of_a_bar_are_as_wide_as_their_shares(file: Path) -> None:
    assert main(["plot", str(file)]) == 0
    root = drawn(file.parent, "step-profile.svg")
    for batch in (1, 1000):
        widths, at = [], math.nan
        for kind, _ in KINDS:
            left, right = ends(root, f"batch-{batch}-{kind}")
            assert math.isnan(at) or left == pytest.approx(at, abs=0.01), "one begins where another ends"
            at = right
            widths.append(right - left)
        assert [w / sum(widths) for w in widths] == pytest.approx([share for _, share in KINDS], abs=1e-3)
    text = said(root)
    assert text.count("4.60 ms") == 2
    assert text.splitlines().count("62") == 2
    assert "3" not in text.splitlines(), "too narrow for a number"
    assert all(kind in text for kind, _ in KINDS)


def widths(root: ElementTree.Element, engine: str) -> list[float]:
    found = []
    for workload in ("1-x-128-in-256-out", "8-x-6000-in-64-out"):
        left, right = ends(root, f"{engine}-{workload}")
        found.append(right - left)
    return found


def test_engines_are_as_long_as_their_times_over_ours(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    path.write_text(json.dumps(served()))
    assert main(["plot", str(path)]) == 0
    root = drawn(tmp_path, "serve-workloads.svg")
    ours = widths(root, "isobatch")
    assert ours[0] == pytest.approx(ours[1], abs=0.01)
    others = {"torch's-kernels-same-engine": 1.1, "vllm-default": 1.25, "vllm-slow": 4.0}
    for engine, times in others.items():
        assert widths(root, engine) == pytest.approx([times * ours[0]] * 2, abs=0.01), engine
    text = said(root)
    assert {"1.50 s", "6.00 s", "13.00 s", "floor", "isobatch", "vllm slow"} <= set(text.splitlines())
    assert "tiny on NVIDIA H999" in text
    # Without another engine ours is drawn all the same.
    alone = served()
    del alone["beside"]
    for one in alone["points"]:
        del one["stock_s"], one["beside"]
    path.write_text(json.dumps(alone))
    assert main(["plot", str(path)]) == 0
    assert "vllm" not in said(drawn(tmp_path, "serve-workloads.svg"))
    path.write_text(json.dumps({**alone, "points": [{"workload": "x"}]}))
    assert main(["plot", str(path)]) == 2


def test_equal_results_give_equal_files(file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "serve.json"
    whole.write_text(json.dumps(served()))
    for folder in ("a", "b"):
        for results in (file, whole):
            assert main(["plot", str(results), "--out", str(tmp_path / folder)]) == 0
    for name in (*step_plots.PLOTS, *serve_plots.PLOTS):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
        assert b"dc:date" not in first
        # What a reference points to is there: names of clips and markers are hashes.
        root = ElementTree.fromstring(first)
        ids = {element.get("id") for element in root.iter()}
        assert {use.get(LINK, "")[1:] for use in root.iter(f"{SVG}use")} <= ids


def _luminance(color: str) -> float:
    parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_stand_out_from_light_and_dark(page: str, file: Path) -> None:
    for color in (svg.INK, *svg.COLORS):
        low, high = sorted((_luminance(color), _luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3, color  # WCAG 2.2, of graphics
    assert main(["plot", str(file)]) == 0
    whole = file.parent / "serve.json"
    whole.write_text(json.dumps(served()))
    assert main(["plot", str(whole)]) == 0
    for name in (*step_plots.PLOTS, *serve_plots.PLOTS):
        text = (file.parent / name).read_text()
        colors = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
        assert colors <= {svg.INK, *svg.COLORS, "#ffffff"}, "nothing in black"


@pytest.mark.parametrize(
    ("lacking", "names"),
    [
        ("profiles", ["step-profile.svg"]),
        ("points", ["step-by-batch.svg", "step-by-context.svg"]),
    ],
)
def test_part_that_is_lacking_is_named_and_the_rest_drawn(
    lacking: str, names: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = [{"what": "the profile of batch 1", "why": "no tracer"}]
    file.write_text(json.dumps({**report(), lacking: [], "left_out": left_out}))
    assert main(["plot", str(file)]) == 2
    message = capsys.readouterr().err
    assert f"lacks what {' and '.join(names)} would show" in message
    assert "got the profile of batch 1: no tracer" in message
    assert "run `isobatch bench serve --only steps`" in message
    assert {path.name for path in file.parent.glob("*.svg")} == set(step_plots.PLOTS) - set(names)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no results at"),
        ("{", "is no results file; expected JSON"),
        ("[]", "is no results file; got list"),
        ('{"points": [{"us": 1}], "model": "tiny"}', "not of this version"),
        ('{"points": [1], "model": "tiny"}', "not of this version"),
        ('{"points": 1, "model": "tiny"}', "not of this version"),
    ],
)
def test_what_is_no_results_file_is_refused(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main(["plot", str(path)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "isobatch bench serve --only steps" in message


def test_machine_without_matplotlib_is_told_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("serve_plots", "step_plots", "svg"):
        monkeypatch.delitem(sys.modules, f"isobatch.cli.{name}")
        monkeypatch.delattr(f"isobatch.cli.{name}")
    assert main(["plot", str(file)]) == 3
    assert "pip install isobatch[plots]" in capsys.readouterr().err
