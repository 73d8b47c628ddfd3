"""The figures of `isobatch bench gpu`: each op against what torch would have run, in graphs, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from isobatch.cli.bench_attention import attention_points, attention_summary
from isobatch.cli.bench_moe import moe_points, moe_summary
from isobatch.cli.bench_rows import row_points, row_summary
from isobatch.cli.checks import verdicts_on
from isobatch.cli.goals import Goal, Point, at_least, at_most, geometric_mean
from isobatch.errors import IntegrityError
from isobatch.kernels import plan as plans
from isobatch.kernels.bitclass import Verdict
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.data import SHORT
from isobatch.kernels.gpu.device import device, dtypes
from isobatch.kernels.gpu.timing import microseconds
from isobatch.kernels.linear import stock
from isobatch.kernels.linear.gpu import Certificates, Linear
from isobatch.kernels.linear.gpu_record import case, forget
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.stock import DenseWeight
from isobatch.models.presets import preset

_MODELS = ("qwen3-8b", "qwen3-30b-a3b", "qwen3-235b-a22b")
_COLD_BYTES = 400 << 20
_FEW_ROWS = 16
_LARGE_WEIGHT_BYTES = 64_000_000


def ceilings() -> dict[str, float]:
    """What the device can do: bytes copied (read and written) and bf16 operations, per second."""
    source = torch.empty(1 << 30, dtype=torch.float32, device=device())
    target = torch.empty_like(source)
    a = case(Shape(8192, 8192, torch.bfloat16, torch.bfloat16), "wide", 8192)
    x, w = a.per_row["x"], a.shared["weight"]
    # In a graph the driver's own copy reaches two thirds of what a kernel does that only copies.
    driver, kernel, multiplied = microseconds(
        [
            lambda _i: target.copy_(source),
            lambda _i: torch.neg(source, out=target),
            lambda _i: stock.linear(x, w),
        ],
        4,
    )
    copied = 2 * source.nbytes / min(driver, kernel) * 1e6
    return {"bytes_per_s": copied, "flop_per_s": 2 * 8192**3 / multiplied * 1e6}


def linear_shapes() -> dict[Shape, str]:
    """Every product of the models that the goals name, results in the dtype that torch gives."""
    dtype = torch.bfloat16
    return {
        Shape(outputs, inputs, dtype, dtype): f"{model} {product}"
        for model in _MODELS
        for product, (outputs, inputs) in preset(model).products().items()
    }


def gate(only: Collection[str], progress: Callable[[str], None]) -> list[Verdict]:
    """Checks bits before any number: every member of the sections' records against its canonical one.

    In the dtype and the heads that are measured; `isobatch doctor --device cuda` certifies all.

    Args:
        only: names of `SECTIONS`.
        progress: told each member.

    Returns:
        The verdict on each; a single refusal means that nothing may be measured.
    """
    records = {}
    for section in only:
        end = f"{SECTIONS[section].kind}/{SHORT[dtypes()[0]]}"
        for name in SECTIONS[section].records:
            record = GPU_RECORDS[name]
            records[name] = replace(record, variants=tuple(v for v in record.variants if v.endswith(end)))
    return verdicts_on(records, lambda name: progress(f"certifying {name}"))


def measure(only: Collection[str], progress: Callable[[str], None]) -> dict[str, Any]:
    """Measures every figure.

    Args:
        only: names of `SECTIONS`.
        progress: told what is being measured.

    Returns:
        ceilings of the device, goals with what was reached, certification's cost, and every point.
    """
    progress("what the device can do")
    limits = ceilings()
    goals, points = [], []
    if "linear" in only:
        progress("certification at start")
        start = certification()
        goals.append(at_most("linear: certification at start, seconds", start["seconds"], 5.0))
    for name in only:
        found = list(SECTIONS[name].points(limits, progress))
        points += found
        goals += SECTIONS[name].summary(found)
    return {"ceilings": limits, "goals": goals, "points": points}


def certification() -> dict[str, Any]:
    """What certification costs at start: Qwen3-8B's shapes, nothing known about this machine.

    Raises:
        IntegrityError: a plan's choice was refused here: the figures would be of something else.
    """
    shapes = [shape for shape, name in linear_shapes().items() if name.startswith("qwen3-8b")]
    linear = Linear(certificates=Certificates(None, keep=False))
    torch.cuda.synchronize()
    started = time.perf_counter()
    linear.prepare(shapes)
    torch.cuda.synchronize()
    if linear.refused:
        raise IntegrityError("the plan's members are not certified here", got="; ".join(linear.refused))
    return {"seconds": time.perf_counter() - started}


def linear_points(limits: dict[str, float], progress: Callable[[str], None]) -> Iterator[Point]:
    """Every shape at every number of rows.

    Args:
        limits: as `ceilings` gives them.
        progress: told each shape.

    Raises:
        IntegrityError: a row alone differs from the row in the batch.
    """
    linear = Linear()
    for shape, name in linear_shapes().items():
        progress(f"linear, {name}")
        linear.prepare([shape])
        drawn = case(shape, "wide", plans.BUCKETS[-1])
        x, first = drawn.per_row["x"], drawn.shared["weight"]
        weight_bytes = first.dense.nbytes
        copies = max(2, min(16, -(-_COLD_BYTES // weight_bytes)))
        weights = [first, *(DenseWeight(first.dense.clone()) for _ in range(copies - 1))]
        alone = linear(x[:1], first)
        for rows in plans.BUCKETS:
            batch = x[:rows]
            if not torch.equal(linear(batch, first)[:1].view(torch.int16), alone.view(torch.int16)):
                raise IntegrityError(f"linear {shape.key}: a row alone differs from the row among {rows}")
            ours, theirs = microseconds(
                [
                    lambda i, batch=batch, weights=weights: linear(batch, weights[i]),  # type: ignore[misc]
                    lambda i, batch=batch, weights=weights: stock.linear(batch, weights[i]),  # type: ignore[misc]
                ],
                copies if rows < 512 else 2,
                rounds=20 if rows < 512 else 8,
            )
            moved = weight_bytes + batch.nbytes + rows * shape.outputs * shape.out_dtype.itemsize
            floor = max(
                moved / limits["bytes_per_s"],
                2 * rows * shape.outputs * shape.inputs / limits["flop_per_s"],
            )
            yield {
                "op": "linear",
                "shape": name,
                "key": shape.key,
                "rows": rows,
                "member": linear.name(shape, rows),
                "isobatch_us": ours,
                "torch_us": theirs,
                "ratio": ours / theirs,
                "floor_us": floor * 1e6,
                "bandwidth_share": moved / limits["bytes_per_s"] / ours * 1e6,
                "weight_bytes": weight_bytes,
            }
        del weights, drawn, first, x
        forget()


def summary(points: list[Point]) -> list[Goal]:
    """The goals, and whether they are met."""
    ratios = [point["ratio"] for point in points]
    shares = [
        point["bandwidth_share"]
        for point in points
        if point["rows"] <= _FEW_ROWS and point["weight_bytes"] >= _LARGE_WEIGHT_BYTES
    ]
    return [
        at_most("linear: geometric mean of time against torch", geometric_mean(ratios), 0.97),
        at_most("linear: worst point against torch", max(ratios), 1.05),
        at_least("linear: least share of copy bandwidth, 1..16 rows", min(shares), 0.8),
    ]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the bench that can be run alone.

    Args:
        records: names of the records whose members must be certified before.
        points: measures.
        summary: the goals, and whether they are met.
        kind: of their variants the one that is like what is measured; all by default.
    """

    records: tuple[str, ...]
    points: Callable[[dict[str, float], Callable[[str], None]], Iterator[Point]]
    summary: Callable[[list[Point]], list[Goal]]
    kind: str = ""


SECTIONS = {
    "linear": Section(("linear",), linear_points, summary),
    "attention": Section(("attention",), attention_points, attention_summary, "grouped"),
    "moe": Section(("moe",), moe_points, moe_summary),
    "rows": Section(("rms_norm", "silu_and_mul", "rotary"), row_points, row_summary),
}
"""The parts of the bench, by the names that `isobatch bench gpu --only` takes."""
