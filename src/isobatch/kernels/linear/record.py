"""Linear's record."""

from __future__ import annotations

from dataclasses import replace

from isobatch.kernels.coding import CODINGS, F32, CodedRows
from isobatch.kernels.cpu.layout import CPU, WIDENED
from isobatch.kernels.cpu.tile import MAX_ROWS
from isobatch.kernels.cpu.widen import FEW
from isobatch.kernels.data import Kind, coded, floats
from isobatch.kernels.linear import cpu, stock
from isobatch.kernels.registry import Member, OpRecord, Reordering, RowCase
from isobatch.kernels.stock import STOCK

_SHAPES: dict[str, tuple[int, int, Kind, bool]] = {
    "wide": (96, 4096, "wide", False),
    "cancel": (64, 4096, "cancel", False),
    "bias": (100, 4099, "wide", True),  # N and K that no tile divides
}


# N that no panel divides, and K of more than one block, the last of them short.
_CODED = {name: coding for name, coding in CODINGS.items() if coding != F32}
_CODED_SHAPE = (100, 608)


def draw(name: str, rows: int, variant: str) -> RowCase:
    """x [rows, K] against W [N, K]."""
    if variant in _CODED:
        N, K = _CODED_SHAPE
        kind: Kind = "wide"
        with_bias = False
        weight = coded(f"{name}/weight", _CODED[variant], N, K)
    else:
        N, K, kind, with_bias = _SHAPES[variant]
        weight = CodedRows.of(floats(f"{name}/weight", N, K, kind="plain" if kind == "cancel" else "wide"))
    bias = floats(f"{name}/bias", N) if with_bias else None
    x = floats(f"{name}/x", rows, K, kind=kind)
    return RowCase({"x": x}, {"weight": weight, "bias": bias}, weights=("weight",))


def reorder(case: RowCase) -> Reordering:
    """The same products, k descending."""
    weight = CodedRows.of(case.shared["weight"].floats().flip(1))
    flipped = replace(
        case, per_row={"x": case.per_row["x"].flip(1)}, shared={**case.shared, "weight": weight}
    )
    return Reordering(case, flipped)


LINEAR = OpRecord(
    name="linear",
    order=cpu.__doc__ or "",
    free_axes=("rows", "coding"),
    fixed_axes=("N", "K"),
    members=(Member("row", cpu.linear_row, WIDENED), Member("tiles", cpu.linear_tiles, CPU)),
    production="tiles",
    stock=Member("torch", stock.linear, STOCK),
    reference=stock.linear_ref,
    draw=draw,
    variants=(*_SHAPES, *_CODED),
    thresholds=(FEW, 4, MAX_ROWS, MAX_ROWS + 2, 16, 2 * MAX_ROWS, 64, 240),
    coded=tuple(_CODED),
    reorder=reorder,
)
