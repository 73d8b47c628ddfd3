"""The members of linear's class on the GPU: by name, by default, and certified for a shape.

A name says all there is to a member: "16x64x256.4.4wt" is a tile (`Tile.name`), "lt16.0" is the first
algorithm that cuBLASLt ranks for 16 rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch

from isobatch.errors import ConfigError
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.linear.cublaslt import Question, algorithms, linear_library
from isobatch.kernels.linear.triton import Tile, linear_tile

Launcher = partial[torch.Tensor]
"""(x, weight, bias, out_dtype) -> y, with a tile of ours or an algorithm of the library bound."""

_TILE = re.compile(r"(\d+)x(\d+)x(\d+)\.(\d+)\.(\d+)(w?)(t?)(?:p(\d+))?")
_LIBRARY = re.compile(r"lt(\d+)\.(\d+)")
RANKS = 8
"""Algorithms of the library that are tried."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed axes of a product.

    Args:
        outputs: N.
        inputs: K.
        dtype: of x and W.
        out_dtype: of the result.
        biased: whether a bias is added.
    """

    outputs: int
    inputs: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    biased: bool = False

    @classmethod
    def of(cls, key: str) -> Shape:
        """The shape that a plan writes so, without a bias."""
        sides, dtype, *out = key.split(".")
        outputs, inputs = map(int, sides.split("x"))
        dtypes = [getattr(torch, name) for name in (dtype, *out)]
        return cls(outputs, inputs, dtypes[0], dtypes[-1])

    @property
    def key(self) -> str:
        """As plans write it. The bias is left out: it changes no member's speed to speak of."""
        names = [str(self.dtype).removeprefix("torch.")]
        if self.out_dtype != self.dtype:
            names.append(str(self.out_dtype).removeprefix("torch."))
        return f"{self.outputs}x{self.inputs}." + ".".join(names)

    def question(self, rows: int) -> Question:
        """What cuBLASLt is asked."""
        return Question(rows, self.outputs, self.inputs, self.dtype, self.out_dtype, self.biased)


def tile_named(name: str) -> Tile:
    """The tile of this name.

    Raises:
        ConfigError: no tile is written so.
    """
    match = _TILE.fullmatch(name)
    if match is None:
        raise ConfigError("unknown member of linear", expected="such as 16x64x256.4.4wt or lt16.0", got=name)
    *numbers, weight_left, tma, resident = match.groups()
    rows, outputs, depth, warps, stages = map(int, numbers)
    return Tile(rows, outputs, depth, warps, stages, bool(weight_left), bool(tma), int(resident or 0))


def launcher(name: str, shape: Shape, small_next: bool = False) -> Launcher | None:
    """What a name stands for at a shape; None where the library has no such algorithm there.

    Args:
        name: the member.
        shape: the fixed axes.
        small_next: as for `linear_tile`; a library's kernels let nobody in before they end.

    Raises:
        ConfigError: nothing is written so.
    """
    library = _LIBRARY.fullmatch(name)
    if library is None:
        return partial(linear_tile, tile=tile_named(name), small_next=small_next)
    if INTERPRETED:
        return None
    rows, rank = map(int, library.groups())
    found = algorithms(shape.question(rows), RANKS)
    return partial(linear_library, algorithm=found[rank]) if rank < len(found) else None


def default(rows: int) -> str:
    """The tile for a shape that no table knows: right for any, and fast for most.

    Args:
        rows: of x.
    """
    for most, name in _DEFAULTS:
        if rows <= most:
            return name
    return _DEFAULT_BEYOND


_DEFAULTS = (
    (16, "16x64x128.4.8w"),
    (32, "32x64x128.4.5wt"),
    (64, "64x64x128.4.5wt"),
    (256, "64x128x64.4.6wt"),
)
_DEFAULT_BEYOND = "128x128x64.4.5tp1"
