"""Rotary embedding's record on the GPU."""

from __future__ import annotations

from functools import partial

from isobatch.kernels.data import floats, integers
from isobatch.kernels.gpu.data import case_variants, split_variant, to_device
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.rotary import stock, triton
from isobatch.kernels.rotary.table import inverse_frequencies, rotary_table
from isobatch.kernels.stock import STOCK

# (heads, head size)
_SHAPES = {"wide": (3, 64), "thirds": (5, 96), "large": (9, 128)}


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Heads at random positions."""
    kind, dtype = split_variant(variant)
    H, D = _SHAPES[kind]
    cos, sin = (to_device(table) for table in rotary_table(inverse_frequencies(D, 100000.0), 512))
    per_row = {
        "x": to_device(floats(f"{name}/x", rows, H, D), dtype),
        "positions": to_device(integers(f"{name}/positions", rows, 512)),
    }
    return RowCase(per_row, {"cos": cos, "sin": sin})


def _member(heads: int, warps: int) -> Member:
    return Member(f"{heads}x{warps}", partial(triton.rotary_tiled, heads=heads, warps=warps), STOCK)


ROTARY = OpRecord(
    name="rotary",
    order=triton.__doc__ or "",
    free_axes=("rows", "tile"),
    fixed_axes=("H", "D", "dtype"),
    members=(
        _member(1, 1),
        Member("rule", triton.rotary, STOCK),
        _member(4, 1),
        _member(16, 4),
        _member(8, 2),
    ),
    production="rule",
    stock=Member("torch", stock.rotary_in_dtype, STOCK),
    reference=stock.rotary_ref,
    draw=draw,
    variants=case_variants(*_SHAPES),
    thresholds=(16,),
)
