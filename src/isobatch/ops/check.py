"""Argument checks shared by all ops: shapes, dtypes, devices, and the range of indices."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from isobatch.errors import ShapeError, UnsupportedOpError
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows


@dataclass(frozen=True, slots=True)
class Check:
    """What the kernels of one device take.

    Args:
        dtype: of weights and activations.
        device: "cpu" or "cuda".
    """

    dtype: torch.dtype
    device: str

    def floats(self, op: str, name: str, tensor: torch.Tensor, *shape: int | None) -> None:
        """Checks weights or activations of a shape; None matches any length.

        Raises:
            UnsupportedOpError: another dtype or device, for which no member is certified.
            ShapeError: another shape.
        """
        self._numbers(op, name, tensor, self.dtype, shape)

    def float32(self, op: str, name: str, tensor: torch.Tensor, *shape: int | None) -> None:
        """The same for what is float32 whatever the model's dtype: logits, and the angles of rotations.

        Raises:
            UnsupportedOpError, ShapeError: as `floats`.
        """
        self._numbers(op, name, tensor, torch.float32, shape)

    def _numbers(
        self, op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
    ) -> None:
        if tensor.dtype is not dtype or tensor.device.type != self.device:
            raise UnsupportedOpError(
                f"{op}: no certified kernel for {name}",
                expected=f"{dtype} on {self.device}",
                got=f"{tensor.dtype} on {tensor.device}",
                fix=f"convert with {name}.to('{self.device}', {dtype})",
            )
        _shape(op, name, tensor, shape)

    def integers(self, op: str, name: str, tensor: torch.Tensor, length: int | None, below: int) -> None:
        """Checks an int64 vector of a length, None matching any, of indices from 0 to below - 1.

        The range is checked on the CPU alone: on the GPU a look at the numbers would wait for all that is
        queued. There it is the engine's, which makes them from plain integers that it has checked.

        Raises:
            ShapeError: another dtype, device or shape; or an index past the end.
        """
        if tensor.dtype is not torch.int64 or tensor.device.type != self.device:
            got = f"{tensor.dtype} on {tensor.device}"
            raise ShapeError(f"{op}: wrong kind of {name}", expected=f"torch.int64 on {self.device}", got=got)
        _shape(op, name, tensor, (length,))
        if self.device != "cpu":
            return
        indices = tensor.tolist()  # of the few rows of most steps, Python finds the range sooner than torch
        if indices:
            low, high = min(indices), max(indices)
            if low < 0 or high >= below:
                raise ShapeError(
                    f"{op}: {name} out of range", expected=f"0..{below - 1}", got=f"{low}..{high}"
                )


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
        column = getattr(parameters, field.name)
        if isinstance(column, torch.Tensor) and (got := len(column)) != count:
            raise ShapeError(f"{op}: wrong length of {field.name}", expected=count, got=got)
