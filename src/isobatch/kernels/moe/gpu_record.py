"""The record of the mixture of experts on the GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch

from isobatch.kernels.data import floats
from isobatch.kernels.gpu.data import case_variants, split_variant
from isobatch.kernels.gpu.device import INTERPRETED, device
from isobatch.kernels.moe import stock
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.moe.triton import PAIRS, GpuExperts, GroupTile, TilePair, moe, moe_plain, moe_tile
from isobatch.kernels.registry import Member, OpRecord, Reordering, RowCase
from isobatch.kernels.stock import STOCK, DenseStack, DenseWeight

# Experts, active ones, hidden width, inner width. Twelve experts: their number need not be a power of two.
_EXPERTS, _ACTIVE, _WIDTH, _INNER = (12, 3, 64, 32) if INTERPRETED else (60, 4, 512, 384)
_OF_ALL = "shares of all"
_PAIRS = (
    (
        TilePair(GroupTile(16, 32, 64, 4, 2, True), GroupTile(16, 16, 32, 4, 2, True)),
        TilePair(GroupTile(32, 16, 32, 4, 2), GroupTile(32, 32, 32, 4, 2)),
    )
    if INTERPRETED
    else PAIRS
)


def _mirrored(tensor: torch.Tensor, sign: int) -> torch.Tensor:
    """The second half of the last axis repeats the first, descending, with this sign."""
    half = tensor.shape[-1] // 2
    tensor[..., half:] = sign * tensor[..., :half].flip(-1)
    return tensor


@cache
def _experts(dtype: torch.dtype, mirrored: bool, renormalise: bool) -> GpuExperts:
    def drawn(name: str, *shape: int) -> torch.Tensor:
        return floats(f"moe/{name}", *shape, kind="plain") / 16

    gate = drawn("gate", _EXPERTS, _INNER, _WIDTH)
    gate_up = torch.cat(
        (_mirrored(gate, -1) * 16 if mirrored else gate, drawn("up", _EXPERTS, _INNER, _WIDTH)), 1
    )
    router, down = drawn("router", _EXPERTS, _WIDTH) / 4, drawn("down", _EXPERTS, _WIDTH, _INNER) * 16
    router, gate_up, down = (weight.to(device(), dtype) for weight in (router, gate_up, down))
    stacks = DenseStack(gate_up), DenseStack(down)
    return Experts(DenseWeight(router), *stacks, active=_ACTIVE, renormalise=renormalise)


def case(name: str, rows: int, dtype: torch.dtype, mirrored: bool, renormalise: bool = True) -> RowCase:
    """x [rows, K] against a layer of experts.

    Args:
        name: the seed of x.
        rows: tokens.
        dtype: of everything.
        mirrored: whether each product with a gate meets its negative, so that what is left is rounding errors
            and another order shows; otherwise ordinary numbers, of which an error can be told.
        renormalise: whether weights are shares of the chosen experts.
    """
    x = floats(f"{name}/x", rows, _WIDTH, kind="wide" if mirrored else "plain")
    x = (_mirrored(x, 1) if mirrored else x).to(device(), dtype)
    return RowCase({"x": x}, {"experts": _experts(dtype, mirrored, renormalise)})


def reorder(case: RowCase) -> Reordering:
    """The same products, k descending."""
    experts: GpuExperts = case.shared["experts"]
    flipped = replace(
        experts,
        router=DenseWeight(experts.router.dense.flip(1)),
        gate_up=DenseStack(experts.gate_up.dense.flip(2)),
    )
    return Reordering(
        case, replace(case, per_row={"x": case.per_row["x"].flip(1)}, shared={"experts": flipped})
    )


def draw(name: str, rows: int, variant: str) -> RowCase:
    """Products that meet their negatives, and weights of either kind."""
    kind, dtype = split_variant(variant)
    return case(name, rows, dtype, mirrored=True, renormalise=kind != _OF_ALL)


MOE = OpRecord(
    name="moe",
    order=moe_tile.__module__,
    free_axes=("tokens",),
    fixed_axes=("E", "A", "K", "I"),
    members=(
        Member("plain", moe_plain, STOCK),
        *(
            Member(f"{pair.up.rows} rows", partial(moe_tile, up=pair.up, down=pair.down), STOCK)
            for pair in _PAIRS
        ),
        *(() if INTERPRETED else (Member("by tokens", moe, STOCK),)),
    ),
    production="16 rows" if INTERPRETED else "by tokens",
    stock=Member("torch", stock.moe, STOCK),
    reference=stock.moe_ref,
    draw=draw,
    # Interpreted, a variant takes a minute; there tests/test_gpu_moe.py looks at the other weights.
    variants=case_variants("mirrored", *(() if INTERPRETED else (_OF_ALL,))),
    # 120 tokens of 60 experts with 4 active are 8 copies per expert; 360, 24; 720, 48. 64: another chunk.
    thresholds=(4,) if INTERPRETED else (4, 64, 120, 360, 720),
    reorder=reorder,
)
