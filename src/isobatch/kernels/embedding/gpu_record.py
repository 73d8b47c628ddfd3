"""Embedding's record on the GPU."""

from __future__ import annotations

from functools import partial

from isobatch.kernels.data import floats, integers
from isobatch.kernels.embedding import stock, triton
from isobatch.kernels.gpu.data import case_variants, split_variant, to_device
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK, DenseWeight


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Token ids into a small vocabulary, of rows that no piece divides."""
    table = to_device(floats(f"{name}/weight", 100, 1504), split_variant(variant)[1])
    return RowCase(
        {"token_ids": to_device(integers(f"{name}/ids", rows, 100))}, {"weight": DenseWeight(table)}
    )


EMBEDDING = OpRecord(
    name="embedding",
    order=triton.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("V", "K", "dtype"),
    members=(
        Member("gather", triton.embedding, STOCK),
        Member("pieces", partial(triton.embedding_tiled, most=256), STOCK),
    ),
    production="gather",
    stock=Member("torch", stock.embedding, STOCK),
    reference=None,
    draw=draw,
    variants=case_variants("wide"),
    thresholds=(16,),
)
