"""The record of an MLP's first half on the GPU. Its canonical member is the chain of its two ops."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from isobatch.kernels.activation.triton import silu_and_mul
from isobatch.kernels.data import floats
from isobatch.kernels.gated import stock
from isobatch.kernels.gpu.data import case_variants, split_variant, to_device
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.gpu.paired import TURN, PairedWeight
from isobatch.kernels.linear.gpu_record import LINEAR, residue
from isobatch.kernels.linear.members import tile_named
from isobatch.kernels.linear.triton import gated_tile, linear_plain
from isobatch.kernels.registry import Member, OpRecord, Reordering, RowCase
from isobatch.kernels.stock import STOCK

# All ways to end: ordinary and bulk copies, the weight on either side, whole and in parts, looping or not.
_TILES = (
    ("16x32x32.4.2w", "16x16x64.4.2wt", "32x32x32.4.2tp1")
    if INTERPRETED
    else (
        "16x64x256.4.4wtp1",
        "64x128x64.4.3",
        "16x64x128.4.8w",
        "16x32x256.2.6",
        "32x64x256.4.4wtp1",
        "64x64x128.4.6wtp1",
        "64x128x64.4.6wt",
        "128x128x64.4.5tp1",
        "128x256x64.8.3tp1",
    )
)
# Outputs of which no tile has a whole number; in the interpreter few, for it takes its time.
_INNER, _INPUTS = (24, 64) if INTERPRETED else (200, 4096)


def gated_plain(x: torch.Tensor, weight: PairedWeight) -> torch.Tensor:
    """The plainest product with gates above ups, then the elementwise kernel."""
    return silu_and_mul(linear_plain(x, weight.apart()))


def gated_in_two(x: torch.Tensor, weight: PairedWeight) -> torch.Tensor:
    """What serves where a library has the product: gates and ups stored in turns, then joined."""
    return silu_and_mul(linear_plain(x, weight.turns), turn=TURN)


def draw(name: str, rows: int, variant: str) -> RowCase:
    """x [rows, K] against gates and ups, of which the half that the variant names has exact results of zero:
    what is left of it is rounding errors, which the other half carries through."""
    kind, dtype = split_variant(variant)
    x = residue(floats(f"{name}/x", rows, _INPUTS), 1)
    halves = [floats(f"gated/{half}", _INNER, _INPUTS, kind="plain") / 64 for half in ("gates", "ups")]
    halves = [residue(w, -1) if half == kind else w for half, w in zip(("gates", "ups"), halves, strict=True)]
    return RowCase(
        {"x": to_device(x, dtype)}, {"weight": PairedWeight.of(to_device(torch.cat(halves), dtype))}
    )


def _reorder(case: RowCase) -> Reordering:
    """The same products, k descending."""
    turned = PairedWeight.of(case.shared["weight"].apart().dense.flip(1))
    return Reordering(
        case, replace(case, per_row={"x": case.per_row["x"].flip(1)}, shared={"weight": turned})
    )


GATED = OpRecord(
    name="gated",
    order=gated_tile.__module__,
    free_axes=("rows", "tile", "kernels"),
    fixed_axes=("I", "K", "dtype"),
    members=(
        Member("chain", gated_plain, STOCK),
        Member("two kernels", gated_in_two, STOCK),
        *(Member(name, partial(gated_tile, tile=tile_named(name)), STOCK) for name in _TILES),
    ),
    production=_TILES[0],
    stock=Member("torch", stock.gated, STOCK),
    reference=stock.gated_ref,
    draw=draw,
    variants=case_variants("gates", "ups"),
    thresholds=LINEAR.thresholds,
    reorder=_reorder,
)
