"""silu_and_mul's record on the GPU."""

from __future__ import annotations

from functools import partial

from isobatch.kernels.activation import stock, triton
from isobatch.kernels.activation.triton import Piece
from isobatch.kernels.data import floats
from isobatch.kernels.gpu.data import case_variants, split_variant, to_device
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK

_WIDTHS = {"wide": 1536, "ragged": 1003}


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Gates and ups side by side."""
    kind, dtype = split_variant(variant)
    return RowCase({"gate_up": to_device(floats(f"{name}/gate_up", rows, 2 * _WIDTHS[kind]), dtype)}, {})


def _member(columns: int, warps: int) -> Member:
    return Member(f"{columns}x{warps}", partial(triton.silu_and_mul_cut, piece=Piece(columns, warps)), STOCK)


SILU_AND_MUL = OpRecord(
    name="silu_and_mul",
    order=triton.__doc__ or "",
    free_axes=("rows", "piece"),
    fixed_axes=("I", "dtype"),
    members=(
        _member(128, 1),
        Member("rule", triton.silu_and_mul, STOCK),
        *(_member(*piece) for piece in ((512, 4), (1024, 4), (1024, 8), (2048, 8))),
    ),
    production="rule",
    stock=Member("torch", stock.silu_and_mul, STOCK),
    reference=stock.silu_and_mul_ref,
    draw=draw,
    variants=case_variants(*_WIDTHS),
    thresholds=(16,),
)
