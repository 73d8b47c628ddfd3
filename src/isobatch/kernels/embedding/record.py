"""Embedding's record."""

from __future__ import annotations

from isobatch.kernels.coding import CODINGS, F32, CodedRows
from isobatch.kernels.cpu.layout import CPU, WIDENED
from isobatch.kernels.data import coded, floats, integers
from isobatch.kernels.embedding import cpu, stock
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK

_CODED = {name: coding for name, coding in CODINGS.items() if coding != F32}


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Token ids into a vocabulary that no panel divides."""
    ids = integers(f"{name}/ids", rows, 100)
    if variant in _CODED:
        weight = coded(f"{name}/weight", _CODED[variant], 100, 96)
    else:
        weight = CodedRows.of(floats(f"{name}/weight", 100, 48))
    return RowCase({"token_ids": ids}, {"weight": weight}, weights=("weight",))


EMBEDDING = OpRecord(
    name="embedding",
    order=cpu.__doc__ or "",
    free_axes=("rows", "coding"),
    fixed_axes=("V", "K"),
    members=(Member("widened", cpu.embedding, WIDENED), Member("gather", cpu.embedding, CPU)),
    production="gather",
    stock=Member("torch", stock.embedding, STOCK),
    reference=None,
    draw=draw,
    variants=("wide", *_CODED),
    thresholds=(16,),
    coded=tuple(_CODED),
)
