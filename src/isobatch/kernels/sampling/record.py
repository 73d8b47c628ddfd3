"""Records of sample and penalize."""

from __future__ import annotations

from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.sampling import cpu, stock
from isobatch.kernels.sampling.cases import penalize_case, sample_case
from isobatch.kernels.stock import STOCK

_V = 1003
_PARAMETERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "noise": (1.0, 0, 1.0, 0.0),
    "filters": (0.7, 20, 0.9, 0.01),
}


def _draw_sample(name: str, rows: int, variant: str) -> RowCase:
    return sample_case(name, rows, _V, [_PARAMETERS[variant]] * rows, tied=500)


SAMPLE = OpRecord(
    name="sample",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("V",),
    members=(Member("gumbel", cpu.sample, CPU),),
    production="gumbel",
    stock=Member("torch", stock.sample, STOCK),
    reference=None,
    draw=_draw_sample,
    variants=tuple(_PARAMETERS),
    thresholds=(8, 16),
)

PENALIZE = OpRecord(
    name="penalize",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("V",),
    members=(Member("scatter", cpu.penalize, CPU),),
    production="scatter",
    stock=Member("torch", stock.penalize, STOCK),
    reference=None,
    draw=lambda name, rows, _variant: penalize_case(name, rows, _V, tens=90),
    variants=("wide",),
    thresholds=(16,),
)
