"""Linear's record on the GPU: one for the tests, of small shapes, and one made to measure for any shape."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch

from isobatch.kernels.data import floats
from isobatch.kernels.gpu.data import case_variants, split_variant
from isobatch.kernels.gpu.device import INTERPRETED, device
from isobatch.kernels.linear import stock
from isobatch.kernels.linear.members import Shape, tile_named
from isobatch.kernels.linear.triton import CANONICAL, linear_plain, linear_tile
from isobatch.kernels.registry import Member, OpRecord, Reordering, RowCase
from isobatch.kernels.stock import STOCK, DenseWeight

# Beyond these many, rows and outputs repeat: drawing is slow, and a kernel cannot know that it has seen them.
_DISTINCT_ROWS, _DISTINCT_OUTPUTS = 256, 64

# As many ways through the kernels as there are: ordinary copies and bulk copies, both operand orders, one
# program per tile and persistent ones, one warp and eight.
TILES = (
    "64x128x64.4.3",
    "16x64x128.4.8w",
    "16x64x256.4.4wt",
    "16x32x256.2.6",
    "16x64x256.4.4wtp1",
    "32x64x128.4.5wt",
    "32x64x256.4.4wtp1",
    "64x64x128.4.5wt",
    "64x64x128.4.6wtp1",
    "64x128x64.4.6wt",
    "128x128x64.4.5tp1",
    "128x256x64.8.3tp1",
)
_INTERPRETED_TILES = ("16x32x32.4.2w", "16x16x64.4.2wt", "32x32x32.4.2tp1")


def residue(tensor: torch.Tensor, sign: int) -> torch.Tensor:
    """The second half of K repeats the first, descending, with this sign.

    Against a weight made with -1, each product meets its negative: the exact sum is zero, what is left is
    rounding errors alone, and even a result of 8 bits shows another order.
    """
    half = tensor.shape[1] // 2
    tensor[:, half : 2 * half] = sign * tensor[:, :half].flip(1)
    tensor[:, 2 * half :] = 0
    return tensor


@cache
def _weight(shape: Shape, kind: str) -> DenseWeight:
    distinct = min(shape.outputs, _DISTINCT_OUTPUTS)
    block = floats(f"linear/{kind}/weight", distinct, shape.inputs, kind="plain").to(device(), shape.dtype)
    block = residue(block, -1) if kind == "residue" else block
    return DenseWeight(block.repeat(-(-shape.outputs // distinct), 1)[: shape.outputs].contiguous())


@cache
def _rows(inputs: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    block = floats(f"linear/{kind}/x", _DISTINCT_ROWS, inputs).to(device(), dtype)
    return residue(block, 1) if kind == "residue" else block


def case(shape: Shape, kind: str, rows: int) -> RowCase:
    """x [rows, K] against W [N, K].

    Args:
        shape: the fixed axes.
        kind: "wide", or "residue", whose exact results are zero.
        rows: how many.
    """
    block = _rows(shape.inputs, shape.dtype, kind)
    x = block.repeat(-(-rows // len(block)), 1)[:rows]
    bias = (
        floats("linear/bias", shape.outputs, kind="plain").to(device(), shape.dtype) if shape.biased else None
    )
    shared = {"weight": _weight(shape, kind), "bias": bias, "out_dtype": shape.out_dtype}
    return RowCase({"x": x}, shared)


def forget() -> None:
    """Frees the matrices that cases share."""
    _weight.cache_clear()
    _rows.cache_clear()


def reorder(case: RowCase) -> Reordering:
    """The same products, k descending."""
    weight = DenseWeight(case.shared["weight"].dense.flip(1))
    return Reordering(
        case,
        replace(case, per_row={"x": case.per_row["x"].flip(1)}, shared={**case.shared, "weight": weight}),
    )


# Fast enough to certify thousands of rows of a wide matrix at start; itself certified against the plain one.
_REFERENCE = tile_named("64x128x64.4.3") if not INTERPRETED else CANONICAL


def record_for(shape: Shape) -> OpRecord:
    """The record of one shape, to certify candidates for it.

    Args:
        shape: the fixed axes.
    """
    return replace(
        LINEAR,
        members=(Member("reference", partial(linear_tile, tile=_REFERENCE), STOCK),),
        production="reference",
        draw=lambda _name, rows, kind: case(shape, kind, rows),
        # The rounding to 16 bits hides most reorderings of the wide kind.
        variants=("wide", "residue") if shape.out_dtype == torch.float32 else ("residue",),
    )


def draw(_name: str, rows: int, variant: str) -> RowCase:
    """x [rows, K] against W [N, K], small enough to be drawn often.

    The seed is the kind's own: certification draws each shape at many row counts, and the rows are to be the
    same ones.
    """
    kind, dtype = split_variant(variant)
    K = 64 if INTERPRETED else 4096
    least, more, odd = (36, 40, 35) if INTERPRETED else (256, 264, 100)
    N = {"residue": least, "logits": more, "bias": odd}
    if kind == "logits":
        return case(Shape(N[kind], K, dtype, torch.float32), "wide", rows)
    if kind == "bias":  # N and K that no tile divides, and rows that the bulk copy engine cannot read
        return case(Shape(N[kind], K + 3, dtype, dtype, biased=True), "residue", rows)
    return case(Shape(N[kind], K, dtype, dtype), "residue", rows)


LINEAR = OpRecord(
    name="linear",
    order=linear_tile.__module__,
    free_axes=("rows",),
    fixed_axes=("N", "K"),
    members=(
        Member("plain", linear_plain, STOCK),
        *(
            Member(name, partial(linear_tile, tile=tile_named(name)), STOCK)
            for name in (_INTERPRETED_TILES if INTERPRETED else TILES)
        ),
        *(
            Member(f"{name}, small next", partial(linear_tile, tile=tile_named(name), small_next=True), STOCK)
            for name in (_INTERPRETED_TILES[:2] if INTERPRETED else (TILES[1], TILES[4]))
        ),
    ),
    production=(_INTERPRETED_TILES if INTERPRETED else TILES)[0],
    stock=Member("torch", stock.linear, STOCK),
    reference=stock.linear_ref,
    draw=draw,
    variants=case_variants("residue", "logits", "bias"),
    thresholds=(16, 32) if INTERPRETED else (16, 32, 64, 128, 256, 1024),
    reorder=reorder,
)
