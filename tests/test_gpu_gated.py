"""The first half of an MLP on the GPU: where rows of its weight lie, and which kernels serve it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.errors import UnsupportedOpError
from isobatch.kernels import plan as plans
from isobatch.kernels.activation.triton import silu_and_mul
from isobatch.kernels.bitclass import certify
from isobatch.kernels.coding import BF16, Q8, CodedRows
from isobatch.kernels.data import coded, floats
from isobatch.kernels.gated import gpu as serving
from isobatch.kernels.gated.gpu import Gated
from isobatch.kernels.gated.gpu_record import GATED, draw, gated_plain
from isobatch.kernels.gpu.data import to_device
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.kernels.gpu.paired import PairedWeight
from isobatch.kernels.linear.gpu import Certificates, Linear
from isobatch.kernels.linear.members import Shape, default, tile_named
from isobatch.kernels.linear.triton import gated_tile, linear_plain, linear_tile
from isobatch.kernels.plan import Plan
from isobatch.kernels.registry import Member
from isobatch.kernels.stock import STOCK, DenseWeight
from isobatch.ops.gpu import GpuOps
from isobatch.ops.gpu_stock import StockGpuOps

DTYPE = dtypes()[0]
INNER, INPUTS = 40, 64
SHAPE = Shape(2 * INNER, INPUTS, DTYPE, DTYPE)
OWN = "16x32x32.4.2w" if INTERPRETED else "16x64x128.4.8w"


@cache
def ops() -> GpuOps:
    return GpuOps(DTYPE, (2, 1, 64))


def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and gates above ups."""
    x, gates_and_ups = floats("gated/x", rows, INPUTS, kind="plain"), floats("gated/w", 2 * INNER, INPUTS)
    return to_device(x, DTYPE), to_device(gates_and_ups / 64, DTYPE)


def library_product(
    x: torch.Tensor, weight: DenseWeight, _bias: None = None, _dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A product that no tile of the plan has, as a library's would be."""
    return linear_plain(x, weight)


@pytest.fixture
def joined_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels have joined gates and ups since."""
    names: list[str] = []
    real: dict[str, Callable[..., Any]] = {"gated_tile": gated_tile, "silu_and_mul": silu_and_mul}

    def seen(name: str, *given: Any, **options: Any) -> Any:
        names.append(name)
        return real[name](*given, **options)

    for name in real:
        monkeypatch.setattr(serving, name, partial(seen, name))
    return names


@pytest.mark.parametrize("pieces", [[80], [40, 40], [3, 5, 31, 2, 39]], ids=str)
def test_rows_put_piece_by_piece_take_turns(pieces: list[int]) -> None:
    _, rows = drawn(1)
    weight = ops().gate_up(2 * INNER, INPUTS, BF16)
    assert isinstance(weight, PairedWeight)
    for start, count in zip(accumulate(pieces, initial=0), pieces, strict=False):
        weight.put(start, CodedRows.of(rows[start : start + count]))
    assert bits_equal(weight.apart().dense, rows)
    turns = weight.turns.dense
    assert bits_equal(turns[16:24], rows[8:16])
    assert bits_equal(turns[24:32], rows[INNER + 8 : INNER + 16])


def test_coded_rows_are_rounded_as_any_weight_s_are() -> None:
    rows = coded("gated/coded", Q8, 2 * INNER, INPUTS)
    paired, plain = ops().gate_up(2 * INNER, INPUTS, Q8), ops().weight(2 * INNER, INPUTS, Q8)
    assert isinstance(paired, PairedWeight)
    assert isinstance(plain, DenseWeight)
    paired.put(0, rows)
    plain.put(0, rows)
    assert bits_equal(paired.apart().dense, plain.dense)


@pytest.mark.parametrize("rows", [1, 17])
def test_a_tile_joins_its_gates_and_ups_and_a_librarys_are_joined_after_it(
    rows: int, tmp_path: Path, joined_by: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = drawn(rows)
    weight = PairedWeight.of(w)
    expected = gated_plain(x, weight)
    plan = Plan("sm90", {"linear": {SHAPE.key: ((None, (OWN,)),)}})
    linear = Linear(plan, Certificates(tmp_path / "certificates.json"))
    assert bits_equal(Gated(linear)(x, weight), expected)
    assert joined_by == ["gated_tile"]
    monkeypatch.setattr(linear, "serving", lambda _shape, _rows: partial(library_product))
    assert bits_equal(Gated(linear)(x, weight), expected)
    assert joined_by == ["gated_tile", "silu_and_mul"]


def test_control_turns_that_are_not_joined_as_turns_are_other_bits() -> None:
    x, w = drawn(3)
    weight = PairedWeight.of(w)
    expected = gated_plain(x, weight)
    assert not bits_equal(silu_and_mul(linear_plain(x, weight.turns)), expected)
    assert not bits_equal(silu_and_mul(linear_plain(x, weight.apart()), turn=8), expected)


def test_control_halves_that_are_joined_before_they_are_rounded_are_refused() -> None:
    def unrounded(x: torch.Tensor, weight: PairedWeight) -> torch.Tensor:
        return silu_and_mul(linear_plain(x, weight.apart(), None, torch.float32)).to(x.dtype)

    assert not certify(GATED, Member("unrounded", unrounded, STOCK), (16,)).member


# What tables name, and what serves without one.
NAMES = sorted(
    {
        name
        for entries in plans.shipped("sm90").ops["linear"].values()
        for _, names in entries
        for name in names
        if not name.startswith("lt")
    }
    | {default(rows) for rows in plans.BUCKETS}
)


@pytest.mark.parametrize("name", NAMES)
def test_every_tile_that_may_serve_is_a_member_as_it_serves(name: str) -> None:
    tile, variant = tile_named(name), GATED.variants[0]
    case = draw("serves", 3, variant)
    x, weight = case.per_row["x"], case.shared["weight"]
    assert bits_equal(gated_tile(x, weight, tile=tile), gated_plain(x, weight))
    before_small = linear_tile(x, weight.turns, None, torch.float32, tile=tile, small_next=True)
    assert bits_equal(before_small, linear_plain(x, weight.turns, None, torch.float32))


@pytest.mark.parametrize("inner", [INNER, INNER + 3], ids=["in turns", "above each other"])
def test_ops_give_the_chains_bits_whatever_the_layout(inner: int) -> None:
    x, _ = drawn(5)
    rows = CodedRows.of(to_device(floats("gated/odd", 2 * inner, INPUTS) / 64, DTYPE))
    weight, plain = ops().gate_up(2 * inner, INPUTS, BF16), ops().weight(2 * inner, INPUTS, BF16)
    assert isinstance(weight, PairedWeight) == (inner == INNER)
    weight.put(0, rows)
    plain.put(0, rows)
    got = ops().gated(x, weight)
    assert got.shape == (5, inner)
    assert bits_equal(got, ops().silu_and_mul(ops().linear(x, plain)))


def test_no_rows_give_no_rows() -> None:
    x, w = drawn(1)
    assert ops().gated(x[:0], PairedWeight.of(w)).shape == (0, INNER)


def test_torchs_kernels_have_gates_above_ups() -> None:
    assert isinstance(StockGpuOps(DTYPE).gate_up(2 * INNER, INPUTS, BF16), DenseWeight)


def test_rows_of_another_dtype_are_refused() -> None:
    x, w = drawn(1)
    with pytest.raises(UnsupportedOpError, match="gated: no certified kernel for x"):
        ops().gated(x.float(), PairedWeight.of(w))
