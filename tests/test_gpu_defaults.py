"""The rule for a shape that no table knows: written down, complete, and right for any N and K."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.kernels import plan as plans
from isobatch.kernels.gpu.device import dtypes
from isobatch.kernels.linear.gpu import Certificates, Linear
from isobatch.kernels.linear.gpu_record import case
from isobatch.kernels.linear.members import Shape, default, tile_named
from isobatch.kernels.linear.triton import linear_plain, linear_tile
from isobatch.kernels.plan import Plan
from isobatch.kernels.registry import Member
from isobatch.kernels.stock import STOCK

ADR = " ".join((Path(__file__).parents[1] / "docs/adr/0011-linear-on-the-gpu.md").read_text().split())
DTYPE = dtypes()[0]
# N and K that no tile divides, that nothing can copy in bulk, and the smallest there are.
ODD = ((1, 1), (35, 67), (131, 8), (64, 129), (7, 250), (257, 24))
RULE = {1: 16, 17: 32, 33: 64, 65: 256, 257: 70_000}
"""The first row count of each tile, and the last that is tried here."""


@pytest.mark.parametrize(("first", "last"), RULE.items())
def test_the_rule_is_the_written_one_for_every_row_count(first: int, last: int) -> None:
    name = default(first)
    assert {default(rows) for rows in range(first, last + 1)} == {name}
    where = "beyond" if first == max(RULE) else f"up to {last} rows"
    assert f"{where} {name}" in ADR
    assert tile_named(name).name == name
    assert name != default(first - 1) or first == 1


def test_a_bucket_is_served_by_the_default_of_each_of_its_row_counts() -> None:
    assert all(default(rows) == default(plans.bucket(rows)) for rows in range(1, 70_001))


@pytest.mark.parametrize(("outputs", "inputs"), ODD)
def test_a_shape_without_a_table_takes_the_default(outputs: int, inputs: int) -> None:
    linear = Linear(Plan("sm90"), Certificates(keep=False))
    shape = Shape(outputs, inputs, DTYPE, DTYPE)
    assert [linear.name(shape, rows) for rows in plans.BUCKETS] == [default(rows) for rows in plans.BUCKETS]
    assert linear.refused == []


@pytest.mark.parametrize(("outputs", "inputs"), ODD)
@pytest.mark.parametrize("biased", [False, True])
def test_every_default_gives_the_canonical_bits_at_odd_shapes(
    outputs: int, inputs: int, biased: bool
) -> None:
    # Results in float32, of which no bit is rounded away.
    drawn = case(Shape(outputs, inputs, DTYPE, torch.float32, biased), "wide", 5)
    (expected,) = drawn.call(Member("plain", linear_plain, STOCK))
    assert expected.all()
    for first in RULE:
        tile = partial(linear_tile, tile=tile_named(default(first)))
        (got,) = drawn.call(Member("default", tile, STOCK))
        assert bits_equal(got, expected), first


def test_the_default_serves_odd_shapes_on_both_sides_of_every_bound() -> None:
    linear = Linear(Plan("sm90"), Certificates(keep=False))
    drawn = case(Shape(35, 67, DTYPE, torch.float32), "wide", 258)
    x, weight = drawn.per_row["x"], drawn.shared["weight"]
    expected = linear_plain(x, weight, None, torch.float32)
    for rows in sorted({row for first in RULE for row in (first, first - 1, first + 1)} - {0}):
        assert bits_equal(linear(x[:rows], weight, None, torch.float32), expected[:rows]), rows
