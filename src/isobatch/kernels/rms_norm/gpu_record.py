"""RMS norm's record on the GPU."""

from __future__ import annotations

from functools import partial

import torch

from isobatch.kernels.data import floats
from isobatch.kernels.gpu.data import case_variants, split_variant, to_device
from isobatch.kernels.registry import Member, OpRecord, Reordering, RowCase
from isobatch.kernels.rms_norm import stock, triton
from isobatch.kernels.rms_norm.triton import Tile
from isobatch.kernels.stock import STOCK

_WIDTHS = {"wide": 4096, "residual": 576, "ragged": 5003, "head": 128}


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Rows of a width, with or without a residual."""
    kind, dtype = split_variant(variant)
    K = _WIDTHS[kind]
    per_row = {"x": to_device(floats(f"{name}/x", rows, K), dtype)}
    if kind == "residual":
        per_row["residual"] = to_device(floats(f"{name}/residual", rows, K), dtype)
    return RowCase(
        per_row, {"weight": to_device(floats(f"{name}/weight", K, kind="plain"), dtype), "eps": 1e-5}
    )


def reorder(case: RowCase) -> Reordering:
    """The same squares, each row rolled by another odd number of places, in float32.

    A sum's last bit moves the scale by less than 2^-23, which an output of 8 or 11 bits next to never shows.
    So the same rows are widened here, and "wide/fp32" and its like are among the variants that certify.
    """
    rows, K = case.per_row["x"].shape
    copies = 1 if K > 1000 else 5  # short sums are often exact: they need more tries
    places = torch.arange(K, device=case.per_row["x"].device)
    by = 2 * torch.arange(rows * copies, device=places.device)[:, None] + 1
    forth, back = (places + by) % K, (places - by) % K
    weight = torch.ones_like(places, dtype=torch.float32)
    before = {name: tensor.float().repeat(copies, 1) for name, tensor in case.per_row.items()}
    after = {name: tensor.gather(1, forth) for name, tensor in before.items()}
    shared = {**case.shared, "weight": weight}
    return Reordering(
        RowCase(before, shared),
        RowCase(after, shared),
        lambda outputs: tuple(o.gather(1, back) for o in outputs),
    )


def _member(rows: int, warps: int) -> Member:
    return Member(f"{rows}x{warps}", partial(triton.rms_norm_tiled, tile=Tile(rows, warps)), STOCK)


RMS_NORM = OpRecord(
    name="rms_norm",
    order=triton.__doc__ or "",
    free_axes=("rows", "tile"),
    fixed_axes=("K", "eps", "dtype"),
    members=(
        _member(1, 4),
        Member("rule", triton.rms_norm, STOCK),
        *(_member(rows, warps) for rows, warps in ((1, 1), (1, 8), (4, 2))),
    ),
    production="rule",
    stock=Member("torch", stock.llama_rms_norm, STOCK),
    reference=stock.rms_norm_ref,
    draw=draw,
    variants=(*case_variants(*_WIDTHS), *(f"{kind}/fp32" for kind in _WIDTHS)),
    thresholds=(8, triton.MANY),
    reorder=reorder,
)
