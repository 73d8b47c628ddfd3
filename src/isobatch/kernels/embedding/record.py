"""Embedding's record."""

from __future__ import annotations

from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats, integers
from isobatch.kernels.embedding import cpu, stock
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK


def draw(name: str, rows: int, _variant: str) -> RowCase:
    """Token ids into a vocabulary that no panel divides."""
    ids = integers(f"{name}/ids", rows, 100)
    return RowCase({"token_ids": ids}, {"weight": floats(f"{name}/weight", 100, 48)}, weights=("weight",))


EMBEDDING = OpRecord(
    name="embedding",
    order=cpu.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("V", "K"),
    members=(Member("gather", cpu.embedding, CPU),),
    production="gather",
    stock=Member("torch", stock.embedding, STOCK),
    reference=None,
    draw=draw,
    variants=("wide",),
    thresholds=(16,),
)
