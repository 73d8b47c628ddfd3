"""Records of sample and penalize on the GPU. Their canonical members are the CPU's own kernels."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from isobatch.kernels.data import integers
from isobatch.kernels.gpu.data import to_device
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.sampling import cpu, stock, triton, triton_penalize
from isobatch.kernels.sampling.cases import penalize_case, sample_case
from isobatch.kernels.sampling.triton import Cut
from isobatch.kernels.stock import STOCK

_V = 131 if INTERPRETED else 5003
# Every path in one batch.
_PARAMETERS = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 0.9, 0.01),
    (1.3, 0, 1.0, 0.05),
    (0.7, 40, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 400, 0.99, 0.0),
)
# The interpreter takes half a second for a row with top_k or top_p: there, few have them.
_EVERY = 20 if INTERPRETED else 1


def _moved(case: RowCase) -> RowCase:
    return replace(case, per_row={name: to_device(tensor) for name, tensor in case.per_row.items()})


def _draw_sample(name: str, rows: int, _variant: str) -> RowCase:
    filtered = integers(f"{name}/filtered", rows, _EVERY) == 0
    which = torch.where(filtered, integers(f"{name}/which", rows, 7), integers(f"{name}/which", rows, 2))
    return _moved(sample_case(name, rows, _V, [_PARAMETERS[i] for i in which.tolist()], tied=100))


def _draw_penalize(name: str, rows: int, _variant: str) -> RowCase:
    return _moved(penalize_case(name, rows, _V, tens=12))


def _on_cpu(function: Any) -> Any:
    def run(logits: torch.Tensor, rows: Any) -> torch.Tensor:
        columns = {f.name: getattr(rows, f.name) for f in fields(rows)}
        there = type(rows)(**{k: v.cpu() for k, v in columns.items() if isinstance(v, torch.Tensor)})
        return to_device(function(logits.cpu(), there))

    return run


def _member(width: int, warps: int, room: int) -> Member:
    cut = Cut(width, warps, room)
    return Member(f"spans of {width}, {room} listed", partial(triton.sample_cut, cut=cut), STOCK)


SAMPLE = OpRecord(
    name="sample",
    order=triton.__doc__ or "",
    free_axes=("rows", "cut"),
    fixed_axes=("V",),
    members=(
        Member("cpu", _on_cpu(cpu.sample), STOCK, capturable=False),
        Member("rule", triton.sample, STOCK),
        _member(64, 1, 64),
        _member(1024, 8, 256),
    ),
    production="rule",
    stock=Member("torch", stock.sample, STOCK),
    reference=None,
    draw=_draw_sample,
    variants=("mixed",),
    thresholds=(8,),
)

PENALIZE = OpRecord(
    name="penalize",
    order=triton_penalize.__doc__ or "",
    free_axes=("rows", "cut"),
    fixed_axes=("V",),
    members=(
        Member("cpu", _on_cpu(cpu.penalize), STOCK, capturable=False),
        Member("rule", triton_penalize.penalize, STOCK),
        Member("short", partial(triton_penalize.penalize_cut, width=128), STOCK),
    ),
    production="rule",
    stock=Member("torch", stock.penalize, STOCK),
    reference=None,
    draw=_draw_penalize,
    variants=("wide",),
    thresholds=(16,),
)
