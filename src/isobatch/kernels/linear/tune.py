"""Autotuning of linear under bitwise equality: candidates are certified, then timed; the fastest are kept.

They are timed as they serve, behind a small kernel that makes their input and before another. A tile of ours
is placed while the one before still runs, and asks for its weights meanwhile; a library's kernel is not, and
keeps the next one waiting, too. Behind its own like, which fills the GPU, a candidate shows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from isobatch.errors import UnsupportedOpError
from isobatch.kernels import plan as plans
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.device import device
from isobatch.kernels.gpu.timing import Work, microseconds
from isobatch.kernels.linear import stock
from isobatch.kernels.linear.gpu import refusal
from isobatch.kernels.linear.gpu_record import case, forget
from isobatch.kernels.linear.members import RANKS, Shape, default, launcher
from isobatch.kernels.linear.nearest import promising
from isobatch.kernels.stock import DenseWeight

# (fewest rows, most rows, tiles worth trying), what was left of a far wider search on an H200.
_TILES: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (
        1,
        32,
        (
            "16x64x256.4.4wt",
            "16x64x256.4.4wtp1",
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
    (17, 32, ("32x64x256.4.4wt", "32x64x256.4.4wtp1", "32x64x256.4.3wtp1")),
    (17, 100, ("32x64x128.4.5wt", "32x64x128.4.4wt", "32x128x64.4.6wt")),
    (33, 64, ("64x64x128.4.6wt", "64x64x128.4.6wtp1", "64x64x256.4.3wtp1")),
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
_EPS = 1e-6
_COPIES = 16
_LONG_ROWS = 512
_COLD_BYTES = 400 << 20  # data that calls go round in: several times the second-level cache
_CACHE_BYTES = 64 << 20  # Hopper's second-level cache is smaller: two such matrices drive each other out


@dataclass(frozen=True, slots=True)
class Search:
    """How far to look.

    Args:
        candidates: names worth trying for a shape and a bucket. All that are tried are certified.
        rounds: of timing; half as many where a call takes long.
        few_copies: whether two copies of a weight will do that is larger than the second-level cache.
    """

    candidates: Callable[[Shape, int], list[str]]
    rounds: int
    few_copies: bool

    def copies(self, shape: Shape) -> int:
        """Copies of the weight that calls go round in."""
        weight_bytes = shape.outputs * shape.inputs * shape.dtype.itemsize
        if self.few_copies and weight_bytes > _CACHE_BYTES:
            return 2
        return max(2, min(_COPIES, -(-_COLD_BYTES // weight_bytes)))


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one bucket.

    Args:
        rows: the bucket.
        torch_us: what torch's own linear adds to the small kernel's time, microseconds.
        times: what every certified candidate adds, fastest first.
        refused: candidates that are not members here, or that cannot run, and why.
        steps: where a model's steps were timed with the fastest of these, how long steps took with each,
            the best first.
    """

    rows: int
    torch_us: float
    times: tuple[tuple[str, float], ...]
    refused: dict[str, str]
    steps: tuple[tuple[str, float], ...] = ()

    def entry(self) -> tuple[int, tuple[str, ...]]:
        """The plan's entry: the fastest, the next, and at least one tile of ours to fall back on."""
        names = list(dict.fromkeys(name for name, _ in (*self.steps, *self.times)))
        own = next((name for name in names if not name.startswith("lt")), default(self.rows))
        return self.rows, tuple(dict.fromkeys([*names[: _KEPT - 1], own]))


def candidates(rows: int) -> list[str]:
    """Names worth trying for a bucket, the library's own suggestions for its neighbours among them."""
    tiles = [name for least, most, names in _TILES if least <= rows <= most for name in names]
    at = plans.BUCKETS.index(rows)
    asked = {plans.BUCKETS[max(0, at - 1)], rows, plans.BUCKETS[min(at + 1, len(plans.BUCKETS) - 1)]}
    return [*tiles, *(f"lt{r}.{rank}" for r in sorted(asked) for rank in range(RANKS))]


THOROUGH = Search(lambda _shape, rows: candidates(rows), rounds=10, few_copies=False)
"""Every candidate: a minute or more for a shape."""


def quick(tables: plans.Plan) -> Search:
    """A few candidates, seconds for a shape: what tables chose at the nearest shapes, and little else."""
    return Search(partial(promising, tables), rounds=5, few_copies=True)


def tune(
    shape: Shape,
    buckets: Sequence[int] = plans.BUCKETS,
    progress: Callable[[int], None] = lambda _rows: None,
    search: Search = THOROUGH,
) -> list[Trial]:
    """Tries candidates at every bucket.

    Args:
        shape: the fixed axes.
        buckets: row counts to tune for.
        progress: told each bucket before it is tried.
        search: which candidates, and how they are timed.

    Returns:
        A trial per bucket.
    """
    # Certified data, not random data: the same numbers on every machine, and as dense in bits.
    drawn = case(shape, "wide", max(buckets))
    x, weights = drawn.per_row["x"], [drawn.shared["weight"]]
    weights += [DenseWeight(weights[0].dense.clone()) for _ in range(search.copies(shape) - 1)]
    trials = []
    for rows in buckets:
        progress(rows)
        trials.append(_try(shape, rows, x[:rows], weights, search))
    forget()
    return trials


def _try(shape: Shape, rows: int, x: torch.Tensor, weights: Sequence[DenseWeight], search: Search) -> Trial:
    norm, ones = GPU_RECORDS["rms_norm"], torch.ones_like(x[0])
    small: Any = norm.member(norm.production).function

    def input_made() -> Any:
        return small(x, ones, _EPS)[0]

    sides: list[tuple[str, Work]] = [
        ("", lambda _: input_made()),
        ("torch", lambda i: stock.linear(input_made(), weights[i % len(weights)])),
    ]
    refused = {}
    for name in search.candidates(shape, rows):
        reason = _refusal(name, shape, rows)
        if reason is not None:
            refused[name] = reason
            continue
        launch: Any = launcher(name, shape, small_next=True)
        sides.append(
            (name, lambda i, f=launch: f(input_made(), weights[i % len(weights)], None, shape.out_dtype))  # type: ignore[misc]
        )
    # Where a call takes long, two copies are as cold as sixteen.
    short = rows < _LONG_ROWS
    copies, rounds = (len(weights), search.rounds) if short else (2, -(-search.rounds // 2))
    alone, *both = microseconds([work for _, work in sides], copies, rounds=rounds)
    timed = [(name, us - alone) for (name, _), us in zip(sides[1:], both, strict=True)]
    return Trial(rows, timed[0][1], tuple(sorted(timed[1:], key=lambda pair: pair[1])), refused)


def _refusal(name: str, shape: Shape, rows: int) -> str | None:
    """Why a candidate is no member here, which may be that it asks for too much shared memory; or None."""
    from triton.runtime.errors import OutOfResources

    try:
        return refusal(shape, name, rows)
    except (OutOfResources, UnsupportedOpError) as error:
        torch.cuda.synchronize(device())
        return f"{type(error).__name__}: {error}"
