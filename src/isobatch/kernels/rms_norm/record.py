"""RMS norm's record."""

from __future__ import annotations

from isobatch.kernels.cpu.jit import SMALL
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats
from isobatch.kernels.registry import Member, OpRecord, Reordering, RowCase
from isobatch.kernels.rms_norm import cpu, stock
from isobatch.kernels.stock import STOCK

_WIDTHS = {"wide": 4096, "residual": 576, "ragged": 1003}


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Rows of a width, with or without a residual."""
    K = _WIDTHS[variant]
    per_row = {"x": floats(f"{name}/x", rows, K)}
    if variant == "residual":
        per_row["residual"] = floats(f"{name}/residual", rows, K)
    return RowCase(per_row, {"weight": floats(f"{name}/weight", K), "eps": 1e-5})


def reorder(case: RowCase) -> Reordering:
    """The same squares, from the last to the first."""
    flipped = RowCase(
        {name: tensor.flip(1) for name, tensor in case.per_row.items()},
        {**case.shared, "weight": case.shared["weight"].flip(0)},
    )
    return Reordering(case, flipped, lambda outputs: tuple(o.flip(1) for o in outputs))


RMS_NORM = OpRecord(
    name="rms_norm",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("K", "eps"),
    members=(Member("lanes", cpu.rms_norm, CPU),),
    production="lanes",
    stock=Member("torch", stock.rms_norm, STOCK),
    reference=stock.rms_norm_ref,
    draw=draw,
    variants=tuple(_WIDTHS),
    thresholds=(*(SMALL // width for width in _WIDTHS.values()), 8, 16, 64),
    reorder=reorder,
)
