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
def _experts(dtype: torch.dtype, kind: str, renormalise: bool) -> GpuExperts:
    def drawn(name: str, *shape: int) -> torch.Tensor:
        return floats(f"moe/{name}", *shape, kind="plain") / 16

    gate, up = drawn("gate", _EXPERTS, _INNER, _WIDTH), drawn("up", _EXPERTS, _INNER, _WIDTH)
    gate_up = torch.cat((gate if kind == "plain" else _mirrored(gate, -1) * 16, up), 1)
    router, down = drawn("router", _EXPERTS, _WIDTH) / 4, drawn("down", _EXPERTS, _WIDTH, _INNER) * 16
    if kind == "cancelling":
        # By threes: the second takes back what the first gives, and the third is small beside them. A token
        # likes the first a little more, and each as much more, so that no choice is a tie.
        router[1::3], gate_up[1::3], down[1::3] = router[0::3], gate_up[0::3], -down[0::3]
        router[0::3, 0], router[1::3, 0] = 0.5, 0.5 - 2.0**-9
        down[0::3] *= 256
        down[1::3] *= 256
        gate_up[:, _INNER:] *= 2**13 // _WIDTH  # results that float16 holds, and holds to eleven bits
    router, gate_up, down = (weight.to(device(), dtype) for weight in (router, gate_up, down))
    stacks = DenseStack(gate_up), DenseStack(down)
    return Experts(DenseWeight(router), *stacks, active=_ACTIVE, renormalise=renormalise)


def case(name: str, rows: int, kind: str, dtype: torch.dtype, renormalise: bool = True) -> RowCase:
    """x [rows, K] against a layer of experts.

    Args:
        name: the seed of x.
        rows: tokens.
        kind: "mirrored", where each product with a gate meets its negative, so that what is left is rounding
            errors and another order over k shows; "cancelling", where a token's experts nearly cancel one
            another as well, so that another order of combining them shows; "plain", ordinary numbers, of
            which an error can be told.
        dtype: of everything.
        renormalise: whether weights are shares of the chosen experts.
    """
    x = floats(f"{name}/x", rows, _WIDTH, kind="plain" if kind == "plain" else "wide")
    if kind == "cancelling":
        x[:, 0] = 0.25
    x = (x if kind == "plain" else _mirrored(x, 1)).to(device(), dtype)
    return RowCase({"x": x}, {"experts": _experts(dtype, kind, renormalise)})


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
    of_all = kind == _OF_ALL
    return case(name, rows, "mirrored" if of_all else kind, dtype, renormalise=not of_all)


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
    # The second shows what the first does, and more; the interpreter is slow, and there
    # tests/test_gpu_moe.py looks at the other weights.
    variants=case_variants(*(() if INTERPRETED else ("mirrored", _OF_ALL)), "cancelling"),
    # 120 tokens of 60 experts with 4 active are 8 copies per expert; 360, 24; 720, 48. 64: another chunk.
    thresholds=(4,) if INTERPRETED else (4, 64, 120, 360, 720),
    reorder=reorder,
)
