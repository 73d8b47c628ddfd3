"""Rotary embedding's record."""

from __future__ import annotations

from isobatch.kernels.cpu.jit import SMALL
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats, integers
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.rotary import cpu, stock
from isobatch.kernels.rotary.table import inverse_frequencies, rotary_table
from isobatch.kernels.stock import STOCK

_HEADS, _SIZE = 3, 64


def draw(name: str, rows: int, _variant: str) -> RowCase:
    """Three heads of 64 at random positions."""
    cos, sin = rotary_table(inverse_frequencies(_SIZE, 100000.0), 512)
    per_row = {
        "x": floats(f"{name}/x", rows, _HEADS, _SIZE),
        "positions": integers(f"{name}/positions", rows, 512),
    }
    return RowCase(per_row, {"cos": cos, "sin": sin})


ROTARY = OpRecord(
    name="rotary",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("H", "D"),
    members=(Member("pairs", cpu.rotary, CPU),),
    production="pairs",
    stock=Member("torch", stock.rotary, STOCK),
    reference=stock.rotary_ref,
    draw=draw,
    variants=("wide",),
    thresholds=(16, SMALL // (_HEADS * _SIZE), 64),
)
