"""The record of linear in float32 on the GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.linear import stock, triton_float32
from isobatch.kernels.linear.gpu_record import case, reorder
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.linear.triton_float32 import CANONICAL, FEW, MANY, linear_float32, linear_float32_tile
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK

_K = 64 if INTERPRETED else 1024
_SHAPES = {"wide": (96, _K, False), "bias": (35, _K + 3, True)}


def draw(_name: str, rows: int, variant: str) -> RowCase:
    """x [rows, K] against W [N, K]; with a bias, N and K that no tile divides."""
    outputs, inputs, biased = _SHAPES[variant]
    drawn = case(Shape(outputs, inputs, torch.float32, torch.float32, biased), "wide", rows)
    return replace(drawn, shared={name: drawn.shared[name] for name in ("weight", "bias")})


def _member(name: str, tile: triton_float32.Tile) -> Member:
    return Member(name, partial(linear_float32_tile, tile=tile), STOCK)


LINEAR_FLOAT32 = OpRecord(
    name="linear_float32",
    order=triton_float32.__doc__ or "",
    free_axes=("rows",),
    fixed_axes=("N", "K"),
    members=(
        _member("plain", CANONICAL),
        _member("16 rows", FEW),
        _member("64 rows", MANY),
        Member("by rows", linear_float32, STOCK),
    ),
    production="by rows",
    stock=Member("torch", stock.linear, STOCK),
    reference=stock.linear_ref,
    draw=draw,
    variants=tuple(_SHAPES),
    thresholds=(16,) if INTERPRETED else (16, 32, 64),
    reorder=reorder,
)
