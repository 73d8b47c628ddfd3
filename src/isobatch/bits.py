"""The one comparison everyone uses: bit patterns, never values, never a tolerance.

By value, NaN differs from itself and -0.0 equals +0.0; by bits it is the other way round, and bits are
what we promise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two tensors first part.

    Args:
        index: position of the first differing element, in row-major order.
        left: its value on the left.
        right: its value on the right.
        ulps: how many representable numbers lie between the two; None for integers and NaN.
        count: how many elements differ in all.
    """

    index: tuple[int, ...]
    left: float
    right: float
    ulps: int | None
    count: int

    def __str__(self) -> str:
        apart = "" if self.ulps is None else f", {self.ulps} ulp apart"
        return f"{self.count} differ, first at {self.index}: {self.left!r} against {self.right!r}{apart}"


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(_AS_INTEGER[tensor.element_size()])


def bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits.

    Args:
        left: any shape, dtype and strides.
        right: likewise.

    Returns:
        True only if every bit agrees.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_integers(left), _integers(right))


def first_difference(left: torch.Tensor, right: torch.Tensor) -> Difference | None:
    """The first element, in row-major order, whose bits differ.

    Args:
        left: any shape and dtype.
        right: the same shape and dtype.

    Returns:
        None when the bits are equal.

    Raises:
        ValueError: the shapes or dtypes differ, so no element can be named.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        raise ValueError(
            f"cannot compare {left.dtype} {tuple(left.shape)} with {right.dtype} {tuple(right.shape)}"
        )
    differing = (_integers(left) != _integers(right)).nonzero()
    if not len(differing):
        return None
    index = tuple(int(i) for i in differing[0])
    a, b = left[index], right[index]
    ulps = None
    if left.dtype.is_floating_point and not (torch.isnan(a) or torch.isnan(b)):
        ulps = int(ulp_distance(a, b))
    return Difference(index, a.item(), b.item(), ulps, len(differing))


def ulp_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between two floating-point tensors.

    Args:
        left: floating point, any shape.
        right: the same shape and dtype.

    Returns:
        int64, the same shape. +0 and -0 are 0 apart.
    """

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        # Signed magnitude becomes a line of integers on which neighbours differ by one.
        whole = _integers(tensor).to(torch.int64)
        lowest = -(1 << (8 * tensor.element_size() - 1))
        return torch.where(whole < 0, lowest - whole, whole)

    return (ordered(left) - ordered(right)).abs()


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over shapes, dtypes and bits.

    Args:
        tensors: any shapes, dtypes and devices.

    Returns:
        64 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(_integers(tensor).cpu().numpy().tobytes())
    return sha.hexdigest()
