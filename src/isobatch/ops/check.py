"""Argument checks shared by all ops: shapes, dtypes, and the range of indices."""

from __future__ import annotations

from dataclasses import fields

import torch

from isobatch.errors import ShapeError, UnsupportedOpError
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows


def floats(op: str, name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    """Checks a float32 CPU tensor of a shape; None matches any length.

    Raises:
        UnsupportedOpError: another dtype or device, for which no member is certified.
        ShapeError: another shape.
    """
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise UnsupportedOpError(
            f"{op}: no certified kernel for {name}",
            expected="torch.float32 on cpu",
            got=f"{tensor.dtype} on {tensor.device}",
            fix=f"convert with {name}.to('cpu', torch.float32)",
        )
    _shape(op, name, tensor, shape)


def integers(op: str, name: str, tensor: torch.Tensor, length: int | None, below: int) -> None:
    """Checks an int64 CPU vector of a length, None matching any, of indices from 0 to below - 1.

    Raises:
        ShapeError: another dtype, device or shape; or an index that would have a kernel read past the end.
    """
    if tensor.dtype is not torch.int64 or not tensor.is_cpu:
        got = f"{tensor.dtype} on {tensor.device}"
        raise ShapeError(f"{op}: wrong kind of {name}", expected="torch.int64 on cpu", got=got)
    _shape(op, name, tensor, (length,))
    indices = tensor.tolist()  # of the few rows of most steps, Python finds the range sooner than torch
    if indices:
        low, high = min(indices), max(indices)
        if low < 0 or high >= below:
            raise ShapeError(f"{op}: {name} out of range", expected=f"0..{below - 1}", got=f"{low}..{high}")


def _shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    have = tensor.shape
    # A plain loop: a step makes hundreds of these checks, and a generator costs more than a small kernel.
    fits = len(shape) == len(have)
    for i in range(len(shape) if fits else 0):
        fits = fits and (shape[i] is None or shape[i] == have[i])
    if not fits:
        expected = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ShapeError(f"{op}: wrong shape of {name}", expected=expected, got=list(tensor.shape))


def rows(op: str, parameters: PenaltyRows | SamplingRows, count: int) -> None:
    """Checks that every field has one entry per row.

    Raises:
        ShapeError: one has more or fewer.
    """
    for field in fields(parameters):
        got = len(getattr(parameters, field.name))
        if got != count:
            raise ShapeError(f"{op}: wrong length of {field.name}", expected=count, got=got)
