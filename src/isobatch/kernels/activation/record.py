"""silu_and_mul's record."""

from __future__ import annotations

from isobatch.kernels.activation import cpu, stock
from isobatch.kernels.cpu.jit import SMALL
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK

_WIDTHS = {"wide": 1536, "ragged": 1003}


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Gates and ups side by side."""
    return RowCase({"gate_up": floats(f"{name}/gate_up", rows, 2 * _WIDTHS[variant])}, {})


SILU_AND_MUL = OpRecord(
    name="silu_and_mul",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("I",),
    members=(Member("elementwise", cpu.silu_and_mul, CPU),),
    production="elementwise",
    stock=Member("torch", stock.silu_and_mul, STOCK),
    reference=stock.silu_and_mul_ref,
    draw=draw,
    variants=tuple(_WIDTHS),
    thresholds=(*(SMALL // width for width in _WIDTHS.values()), 16, 64),
)
