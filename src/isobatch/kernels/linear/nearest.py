"""What to try at a shape that nobody has tuned: what tables chose at the shapes most like it."""

from __future__ import annotations

import torch

from isobatch.kernels.linear.members import Shape, default
from isobatch.kernels.plan import Plan

_NEIGHBOURS = 3
_RANKS = 3
# Up to so many rows, tiles that are fast among a model's other kernels; older tables may not know them.
_FEW = (
    (16, ("16x64x128.4.8w", "16x64x256.4.4wt", "16x64x256.4.4wtp1")),
    (32, ("32x64x256.4.4wt", "32x64x256.4.4wtp1")),
    (64, ("64x64x128.4.5wt", "64x64x128.4.6wtp1")),
)


def nearest(plan: Plan, shape: Shape) -> list[str]:
    """The keys of the tuned shapes most like this one, the nearest first.

    Those of the same dtypes come before all others. Among them the distance is a factor: how many times
    larger or smaller N is, times the same of K.

    Args:
        plan: with tables of linear.
        shape: the fixed axes.
    """

    def distance(key: str) -> tuple[bool, float, str]:
        other = Shape.of(key)
        apart = _times(other.outputs, shape.outputs) * _times(other.inputs, shape.inputs)
        return (other.dtype, other.out_dtype) != (shape.dtype, shape.out_dtype), apart, key

    # Whether results are rounded to 16 bits or stored in 32 decides how wide a tile may be.
    wide = shape.out_dtype == torch.float32
    alike = [key for key in plan.ops.get("linear", {}) if key.endswith(".float32") == wide]
    return sorted(alike, key=distance)[:_NEIGHBOURS]


def _times(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def promising(plan: Plan, shape: Shape, rows: int) -> list[str]:
    """Names of a few members worth trying: the neighbours', our usual ones, the library's first ranks.

    Args:
        plan: with tables of linear; without any, less is tried.
        shape: the fixed axes.
        rows: the bucket.
    """
    theirs = [name for key in nearest(plan, shape) for name in plan.names("linear", key, rows)]
    few = next((names for most, names in _FEW if rows <= most), ())
    return list(
        dict.fromkeys([*theirs, *few, default(rows), *(f"lt{rows}.{rank}" for rank in range(_RANKS))])
    )
