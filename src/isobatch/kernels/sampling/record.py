"""Records of sample and penalize."""

from __future__ import annotations

import torch

from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats, integers
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.sampling import cpu, stock
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows
from isobatch.kernels.stock import STOCK

_V = 1003
# temperature, top_k, top_p, min_p
_PARAMETERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "noise": (1.0, 0, 1.0, 0.0),
    "filters": (0.7, 20, 0.9, 0.01),
}


def _draw_sample(name: str, rows: int, variant: str) -> RowCase:
    temperature, top_k, top_p, min_p = _PARAMETERS[variant]
    logits = floats(f"{name}/logits", rows, _V, kind="plain") * 4
    logits[:, 7] = logits[:, 500]  # a tie
    per_row = {
        "logits": logits,
        "temperature": torch.full((rows,), temperature),
        "top_k": torch.full((rows,), top_k),
        "top_p": torch.full((rows,), top_p),
        "min_p": torch.full((rows,), min_p),
        "seed": integers(f"{name}/seed", rows, 2**31) * -3,
        "position": integers(f"{name}/position", rows, 4096),
    }
    return RowCase(per_row, {}, group=("rows", SamplingRows))


def _draw_penalize(name: str, rows: int, _variant: str) -> RowCase:
    seen = torch.stack([torch.arange(10) + 10 * int(s) for s in integers(f"{name}/ids", rows, 90)])
    seen[:, 8:] = -1
    per_row = {
        "logits": floats(f"{name}/logits", rows, _V),
        "ids": seen,
        "counts": integers(f"{name}/counts", rows * 10, 3).reshape(rows, 10),
        "repetition": torch.full((rows,), 1.3),
        "presence": torch.full((rows,), 0.4),
        "frequency": torch.full((rows,), 0.7),
    }
    return RowCase(per_row, {}, group=("rows", PenaltyRows))


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
    draw=_draw_penalize,
    variants=("wide",),
    thresholds=(16,),
)
