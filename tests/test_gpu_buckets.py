"""Linear at real shapes, at every row count where a plan or a tile may change: each row is the row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.kernels.linear.gpu import Certificates, Linear
from isobatch.kernels.linear.gpu_record import case, forget
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.linear.triton import linear_plain
from isobatch.kernels.plan import BUCKETS
from isobatch.models.presets import preset
from tests.gpu_faults import split_by_load

DTYPE = dtypes()[0]
TILE_ROWS = (16, 32, 64, 128, 256)
COUNTS = sorted({n + d for n in (*BUCKETS, *TILE_ROWS) for d in (-1, 0, 1)} - {0})
DISTINCT = 256
"""Rows of a case repeat from here on, so the rows alone are soon known."""
SMALL = Shape(48, 64, DTYPE, DTYPE) if INTERPRETED else Shape(1024, 4096, DTYPE, DTYPE)


def first_moved(linear: Callable[..., Any], shape: Shape, counts: Sequence[int]) -> str | None:
    """The first row count at which some row has other bits than alone, or None.

    All rows are looked at, the first, the middle and the last among them.
    """
    drawn = case(shape, "residue", max(counts))  # exact results are zero: every bit is an order's
    x, weight = drawn.per_row["x"], drawn.shared["weight"]
    alone = torch.cat([linear(x[row : row + 1], weight) for row in range(min(DISTINCT, len(x)))])
    assert alone.any(), "no rounding error is left to compare"
    for count in counts:
        place = torch.arange(count, device=x.device) % DISTINCT
        if not bits_equal(linear(x[:count], weight), alone[place]):
            return f"{count} rows of {shape.key}"
    return None


@cache
def served() -> Linear:
    return Linear(certificates=Certificates(keep=False))


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize(
    ("product", "dtype"), [("qkv", torch.bfloat16), ("down", torch.bfloat16), ("down", torch.float16)]
)
def test_rows_are_the_rows_alone_at_every_bucket_and_tile_edge(product: str, dtype: torch.dtype) -> None:
    shape = Shape(*preset("qwen3-8b").products()[product], dtype, dtype)
    served().prepare([shape])
    assert first_moved(served(), shape, COUNTS) is None
    forget()


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
def test_sixty_five_thousand_rows_are_the_rows_alone() -> None:
    shape = Shape(*preset("qwen3-8b").products()["qkv"], torch.bfloat16, torch.bfloat16)
    assert first_moved(served(), shape, [65_536]) is None
    forget()


def test_the_plain_member_passes_and_a_split_chosen_from_load_does_not() -> None:
    counts = (1, 8, 9, 17)
    assert first_moved(linear_plain, SMALL, counts) is None
    assert first_moved(split_by_load, SMALL, counts) == f"9 rows of {SMALL.key}"
