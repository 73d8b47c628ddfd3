"""Records of log_softmax and top_log_probs."""

from __future__ import annotations

from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats, integers
from isobatch.kernels.log_probs import cpu, stock
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK

_VOCABULARIES = {"plain": 4096, "ragged": 5003}


def _draw_logits(name: str, rows: int, variant: str) -> RowCase:
    return RowCase({"logits": floats(f"{name}/logits", rows, _VOCABULARIES[variant], kind="plain")}, {})


def _draw_top(name: str, rows: int, variant: str) -> RowCase:
    case = _draw_logits(name, rows, variant)
    case.per_row["chosen"] = integers(f"{name}/chosen", rows, _VOCABULARIES[variant])
    return RowCase(case.per_row, {"count": 5})


LOG_SOFTMAX = OpRecord(
    name="log_softmax",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("V",),
    members=(Member("lanes", cpu.log_softmax, CPU),),
    production="lanes",
    stock=Member("torch", stock.log_softmax, STOCK),
    reference=stock.log_softmax_ref,
    draw=_draw_logits,
    variants=tuple(_VOCABULARIES),
    thresholds=(8, 16),
)

TOP_LOG_PROBS = OpRecord(
    name="top_log_probs",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("V", "count"),
    members=(Member("lanes", cpu.top_log_probs, CPU),),
    production="lanes",
    stock=Member("torch", stock.top_log_probs, STOCK),
    reference=None,
    draw=_draw_top,
    variants=tuple(_VOCABULARIES),
    thresholds=(8, 16),
)
