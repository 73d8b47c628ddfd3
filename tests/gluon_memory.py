"""Numbers, memory and shared memory of kernels that `tests/gluon_interpreter.py` runs, as NumPy has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.gluon_threads import give_way


class Number(int):
    """An integer of a kernel; what is computed of it is one, too."""

    def to(self, _dtype: Any) -> Number:
        return self


def _arithmetic(operation: str) -> Callable[..., Any]:
    plain = getattr(int, operation)

    def compute(*operands: Any) -> Any:
        result = plain(*operands)
        return Number(result) if isinstance(result, int) else result

    return compute


for _name in ["add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"]:
    for _operation in (f"__{_name}__", f"__r{_name}__"):
        setattr(Number, _operation, _arithmetic(_operation))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _arithmetic(f"__{_name}__"))


class Constant(int):
    """What is known when a kernel is compiled."""

    @property
    def value(self) -> int:
        return int(self)


class Tensor(np.ndarray):
    """Numbers in registers."""

    def to(self, dtype: Any) -> Any:
        return tensor(self.astype(dtype))


def tensor(values: Any) -> Any:
    """Numbers of a kernel; a `Number` or a float if there is but one."""
    values = np.asarray(values)
    if values.ndim:
        return values.view(Tensor)
    return values.item() if values.dtype.kind == "f" else Number(values)


class Pointer:
    """Places in a tensor's memory."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = self  # of which `element_ty` is asked

    @property
    def element_ty(self) -> Any:
        return self.memory.dtype

    def __add__(self, distance: Any) -> Pointer:
        return Pointer(self.memory, self.at + distance)


class Descriptor:
    """What the bulk copy engine knows of a tensor."""

    layout = None

    def __init__(self, source: TensorDescriptor) -> None:
        flat = source.base
        self.rows = np.lib.stride_tricks.as_strided(
            memory_of(flat), flat.shape, [stride * flat.element_size() for stride in flat.stride()]
        )
        self.box = tuple(source.block_shape)
        self.dtype = self.rows.dtype
        self.block_type = self  # of which `nbytes` is asked
        self.nbytes = int(np.prod(self.box)) * flat.element_size()


def memory_of(of: torch.Tensor) -> np.ndarray:
    """From the tensor's first number to its storage's end."""
    flat = torch.empty(0, dtype=of.dtype).set_(of.untyped_storage())
    return flat.numpy()[of.storage_offset() :]


class Shared:
    """A piece of shared memory."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers, self.dtype, self.shape = numbers, numbers.dtype, numbers.shape

    def index(self, at: int) -> Shared:
        return Shared(self.numbers[int(at)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.numbers[int(start) : int(start) + length])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.numbers.transpose(order))

    def load(self, _layout: Any = None) -> Any:
        give_way()
        return tensor(self.numbers.copy())

    def store(self, values: Any) -> None:
        give_way()
        self.numbers[...] = values


class Token:
    """A product that has been begun: its sum, and what it read."""

    def __init__(self, total: np.ndarray, reads: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.total, self.reads = total, reads
