"""Autotuning of linear under bitwise equality: candidates are certified, then timed; the fastest are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isobatch.errors import UnsupportedOpError
from isobatch.kernels import plan as plans
from isobatch.kernels.gpu.device import device
from isobatch.kernels.gpu.timing import Work, microseconds
from isobatch.kernels.linear import stock
from isobatch.kernels.linear.gpu import certified
from isobatch.kernels.linear.gpu_record import case, forget
from isobatch.kernels.linear.members import RANKS, Shape, launcher
from isobatch.kernels.stock import DenseWeight

# (fewest rows, most rows, tiles worth trying), what was left of a far wider search on an H200.
_TILES: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (
        1,
        32,
        (
            "16x64x256.4.4wt",
            "16x64x128.4.8wt",
            "16x64x128.4.8w",
            "16x128x64.4.8w",
            "16x128x128.4.5w",
            "16x128x128.4.5wt",
            "16x128x128.8.5wt",
            "16x128x256.8.3wt",
            "16x32x256.2.6",
            "16x32x512.4.4",
            "16x16x512.2.4",
        ),
    ),
    (17, 100, ("32x64x128.4.5wt", "32x64x128.4.4wt", "32x128x64.4.6wt")),
    (
        33,
        256,
        (
            "64x32x128.4.5t",
            "64x64x128.4.5wt",
            "64x64x64.4.8wt",
            "64x64x64.4.6t",
            "64x128x64.4.6wt",
            "64x128x64.4.5t",
            "64x256x64.8.4t",
            "64x256x64.4.4tp1",
        ),
    ),
    (65, 512, ("128x64x128.4.4wt", "128x128x64.4.5t")),
    (65, plans.BUCKETS[-1], ("128x128x64.4.5tp1", "128x256x64.8.3tp1")),
)
_KEPT = 3
_COLD_BYTES = 400 << 20  # data that calls go round in: several times the second-level cache


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one bucket.

    Args:
        rows: the bucket.
        torch_us: torch's own linear, microseconds.
        times: every certified candidate's time, fastest first.
        refused: candidates that are not members here, or that cannot run.
    """

    rows: int
    torch_us: float
    times: tuple[tuple[str, float], ...]
    refused: tuple[str, ...]

    def entry(self) -> tuple[int, tuple[str, ...]]:
        """The plan's entry: the fastest, the next, and at least one tile of ours to fall back on."""
        names = [name for name, _ in self.times]
        own = next(name for name in names if not name.startswith("lt"))
        return self.rows, tuple(dict.fromkeys([*names[: _KEPT - 1], own]))


def candidates(rows: int) -> list[str]:
    """Names worth trying for a bucket, the library's own suggestions for its neighbours among them."""
    tiles = [name for least, most, names in _TILES if least <= rows <= most for name in names]
    at = plans.BUCKETS.index(rows)
    asked = {plans.BUCKETS[max(0, at - 1)], rows, plans.BUCKETS[min(at + 1, len(plans.BUCKETS) - 1)]}
    return [*tiles, *(f"lt{r}.{rank}" for r in sorted(asked) for rank in range(RANKS))]


def tune(
    shape: Shape,
    buckets: Sequence[int] = plans.BUCKETS,
    progress: Callable[[int], None] = lambda _rows: None,
) -> list[Trial]:
    """Tries every candidate at every bucket.

    Args:
        shape: the fixed axes.
        buckets: row counts to tune for.
        progress: told each bucket before it is tried.

    Returns:
        A trial per bucket.
    """
    weight_bytes = shape.outputs * shape.inputs * shape.dtype.itemsize
    copies = max(2, min(16, -(-_COLD_BYTES // weight_bytes)))
    # Certified data, not random data: the same numbers on every machine, and as dense in bits.
    drawn = case(shape, "wide", max(buckets))
    x, weights = drawn.per_row["x"], [drawn.shared["weight"]]
    weights += [DenseWeight(weights[0].dense.clone()) for _ in range(copies - 1)]
    trials = []
    for rows in buckets:
        progress(rows)
        trials.append(_try(shape, rows, x[:rows], weights))
    forget()
    return trials


def _try(shape: Shape, rows: int, x: torch.Tensor, weights: Sequence[DenseWeight]) -> Trial:
    sides: list[tuple[str, Work]] = [("torch", lambda i: stock.linear(x, weights[i % len(weights)]))]
    refused = []
    for name in candidates(rows):
        if not _runs(name, shape, rows):
            refused.append(name)
            continue
        launch: Any = launcher(name, shape)
        sides.append((name, lambda i, f=launch: f(x, weights[i % len(weights)], None, shape.out_dtype)))  # type: ignore[misc]
    # Where a call takes long, two copies are as cold as sixteen.
    copies = len(weights) if rows < 512 else 2
    times = microseconds([work for _, work in sides], copies, rounds=10 if rows < 512 else 5)
    timed = [(name, us) for (name, _), us in zip(sides, times, strict=True)]
    return Trial(rows, timed[0][1], tuple(sorted(timed[1:], key=lambda pair: pair[1])), tuple(refused))


def _runs(name: str, shape: Shape, rows: int) -> bool:
    """Whether a candidate is a member here; one that asks for too much shared memory, say, is not."""
    from triton.runtime.errors import OutOfResources

    try:
        return certified(shape, name, rows)
    except (OutOfResources, UnsupportedOpError):
        torch.cuda.synchronize(device())
        return False
