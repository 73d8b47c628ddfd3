"""Runs kernels in Gluon on the CPU: their own text on NumPy, each group of warps in an order drawn at random.

Triton's interpreter does not know Gluon. Here a group of warps is a thread of which one runs at a time; where
it touches what others touch, a draw says who goes on. Barriers count phases and bytes as the hardware does,
so a wait is passed early where the hardware would let it pass. Copies arrive in any order, page by page. What
a product reads must be the same when it is issued and when it is waited for. Shared memory begins as NaN.

Products are taken in float64 and rounded when they are waited for, as `product` has it under Triton's
interpreter, so results are the canonical member's, bit for bit. Fences and layouts are not looked at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import constexpr
from triton.runtime.jit import JITFunction

from tests.gluon_memory import Constant, Descriptor, Number, Pointer, Shared, Token, memory_of, tensor
from tests.gluon_threads import HERE, Alone, Barrier, Barriers, HandoverError, World, give_way


class _Mbarrier:
    """`mbarrier` of Gluon."""

    @staticmethod
    def MBarrierLayout() -> str:  # noqa: N802 - Gluon's name
        return "barriers"

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def wait(barrier: Barrier, parity: int, pred: bool = True) -> None:
        give_way((lambda: barrier.phase & 1 != parity) if pred else None)

    @staticmethod
    def expect(barrier: Barrier, size: int) -> None:
        give_way()
        barrier.arrive(size)

    @staticmethod
    def arrive(barrier: Barrier, pred: bool = True) -> None:
        give_way()
        if pred:
            barrier.arrive()


class _Tma:
    @staticmethod
    def store_wait(_pending: int) -> None:
        give_way()


def _bulk_copy(source: Descriptor, at: Sequence[int], barrier: Barrier, to: Shared) -> None:
    give_way()
    to.numbers[...] = float("nan")  # until it has come
    row, column = map(int, at)

    def arrive() -> None:
        rows = source.rows[row : row + source.box[0], column : column + source.box[1]]
        to.numbers[...] = 0
        to.numbers[: rows.shape[0], : rows.shape[1]] = rows
        barrier.bytes -= source.nbytes
        barrier.settle()

    HERE.world.copies.append(arrive)


def _bulk_store(target: Descriptor, at: Sequence[int], source: Shared) -> None:
    give_way()
    row, column = map(int, at)
    target.rows[row : row + target.box[0], column : column + target.box[1]] = source.numbers


def _numbers(operand: Any) -> np.ndarray:
    return operand.numbers if isinstance(operand, Shared) else np.asarray(operand)


def _mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Token:
    give_way()
    reads = acc.reads if isinstance(acc, Token) else []
    reads = [*reads, *((x.numbers, x.numbers.copy()) for x in (a, b) if isinstance(x, Shared))]
    total = _numbers(a).astype(np.float64) @ _numbers(b).astype(np.float64)
    if use_acc:
        total = total + (acc.total if isinstance(acc, Token) else np.asarray(acc, np.float64))
    return Token(total, reads)


def _mma_wait(_pending: int, deps: Sequence[Any]) -> Any:
    give_way()
    for token in deps:
        for numbers, before in token.reads if isinstance(token, Token) else ():
            if not np.array_equal(numbers, before, equal_nan=True):
                raise HandoverError("what a product reads is written while it runs")
    got = [tensor(d.total.astype(np.float32)) if isinstance(d, Token) else d for d in deps]
    return got[0] if len(got) == 1 else tuple(got)


class _Language:
    """`gl`: what is not here is a layout, which nobody looks at."""

    constexpr = Constant
    int8, int32, int64, float32 = np.int8, np.int32, np.int64, np.float32

    def __init__(self, programs: Sequence[int], place: Sequence[int]) -> None:
        self._programs, self._place = (*programs, 1, 1), (*place, 0, 0)

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_arguments, **_named: None

    def num_programs(self, axis: int) -> Number:
        return Number(self._programs[axis])

    def program_id(self, axis: int) -> Number:
        return Number(self._place[axis])

    static_range = staticmethod(range)

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Any:
        return tensor(np.arange(start, end, dtype=np.int64))

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: Any, layout: Any = None) -> Any:
        return tensor(np.full(shape, value, dtype))

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: Any, layout: Any = None) -> Any:
        return cls.full(shape, 0, dtype)

    @staticmethod
    def zeros_like(x: Any) -> Any:
        return tensor(np.zeros_like(x))

    @staticmethod
    def cdiv(a: int, b: int) -> Number:
        return Number(-(-a // b))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return tensor(np.where(condition, a, b))

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return tensor(np.maximum(a, b))

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return tensor(np.minimum(a, b))

    @staticmethod
    def max(x: Any, axis: int) -> Any:
        return tensor(np.max(np.asarray(x), axis))

    @staticmethod
    def min(x: Any, axis: int) -> Any:
        return tensor(np.min(np.asarray(x), axis))

    @staticmethod
    def abs(x: Any) -> Any:
        return tensor(np.abs(x))

    @staticmethod
    def expand_dims(x: Any, axis: int) -> Any:
        return tensor(np.expand_dims(x, axis))

    @staticmethod
    def convert_layout(x: Any, _layout: Any) -> Any:
        return x

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Any:
        give_way()
        at = np.where(mask, pointer.at, 0)
        if at.size and not (at.min() >= 0 and at.max() < pointer.memory.size):
            raise HandoverError("a load beyond its memory")
        return tensor(np.where(mask, pointer.memory[at], np.asarray(other, pointer.memory.dtype)))

    @staticmethod
    def store(pointer: Pointer, values: Any, mask: Any = True) -> None:
        give_way()
        at, values, mask = np.broadcast_arrays(pointer.at, values, np.asarray(mask, bool))
        pointer.memory[at[mask]] = values[mask]

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            return Barriers(shape[0])
        return Shared(np.full(shape, float("nan"), dtype))

    @staticmethod
    def warp_specialize(jobs: Sequence[tuple[Any, Any]], _warps: Any, _registers: Any) -> None:
        beside = HERE.beside
        World(HERE.draw).run([*beside, *(lambda f=f, a=a: f(*a) for f, a in jobs)])


def _lanes_down(p: np.ndarray, _columns: int) -> Any:
    """Four chains a column, keys ascending: lane t has the keys j with (j mod 8) // 2 == t."""
    total = np.zeros((4, p.shape[1]), np.float32)
    for j in range(p.shape[0]):
        total[j % 8 // 2] += np.asarray(p[j])
    return tensor(total.T.copy())


def _row_total(lanes: np.ndarray, _rows: int) -> Any:
    lanes = np.asarray(lanes)
    return tensor((lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3]))


def _acquired(counter: Pointer) -> Any:
    return _Language.load(counter)


def _nothing(*_arguments: Any) -> None:
    pass


_FUNCTIONS: dict[str, Any] = {
    "mbarrier": _Mbarrier,
    "tma": _Tma,
    "bulk_copy": _bulk_copy,
    "bulk_store": _bulk_store,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
    "barrier": _nothing,
    "fence_async_shared": _nothing,
    "gdc_launch_dependents": _nothing,
    "acquired": _acquired,
    "looked_up": lambda at, _settled: _Language.load(at),
    "lane_sums_down": _lanes_down,
    "lane_sums": lambda p, rows: _lanes_down(np.asarray(p).T, rows),
    "row_total": _row_total,
    "ex2": lambda x: tensor(np.exp2(np.asarray(x))),
    "mul": lambda x, y: x * y,
    "sub": lambda x, y: x - y,
    "fma": lambda x, y, z: x * y + z,
    "rescale": lambda acc, factors, _count: acc * factors,
}


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(memory_of(value))
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return Number(value)
    return np.float32(value) if isinstance(value, float) else value


_OF_THE_LAUNCH = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class _Kernel:
    """A kernel that runs here, program after program."""

    def __init__(self, function: Callable[..., object], modules: Sequence[ModuleType], seed: int) -> None:
        self._function, self._modules, self._draw = function, modules, random.Random(seed)
        self.beside: Callable[[], Sequence[Callable[[], object]]] = lambda: ()
        self.waited: Callable[[], bool] = lambda: True

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            given = [_argument(value) for value in arguments]
            known = {
                name: Constant(value) if isinstance(value, int) else value
                for name, value in named.items()
                if name not in _OF_THE_LAUNCH
            }
            HERE.draw, places = self._draw, list(np.ndindex(*grid))
            self._draw.shuffle(places)
            for n, place in enumerate(places):
                HERE.beside = self.beside() if n == 0 else ()
                with ExitStack() as stack:
                    language = _Language(grid, place)
                    for module in self._modules:
                        stack.enter_context(patch.object(module, "gl", language))
                        if hasattr(module, "gdc_wait"):
                            stack.enter_context(patch.object(module, "gdc_wait", self._wait))
                    with np.errstate(all="ignore"):
                        HERE.world = Alone()
                        self._function(*given, **known)

        return launch

    def _wait(self) -> None:
        give_way(self.waited)


@contextmanager
def interpreted(modules: Sequence[ModuleType], name: str, seed: int) -> Iterator[_Kernel]:
    """Kernel `name` of the first of these modules runs on the CPU, with the functions of all of them.

    Args:
        modules: whose functions in Gluon it calls.
        name: of the kernel.
        seed: of the order in which its threads go on.

    Yields:
        The kernel: `beside` gives threads that run beside its first program, `waited` what it waits for.
    """
    with ExitStack() as stack:
        for module in modules:
            for own, value in list(vars(module).items()):
                if own in _FUNCTIONS:
                    stack.enter_context(patch.object(module, own, _FUNCTIONS[own]))
                elif isinstance(value, JITFunction):
                    stack.enter_context(patch.object(module, own, value.fn))
                elif isinstance(value, constexpr) and isinstance(value.value, int):
                    stack.enter_context(patch.object(module, own, Constant(value.value)))
        kernel = _Kernel(getattr(modules[0], name), modules, seed)
        stack.enter_context(patch.object(modules[0], name, kernel))
        yield kernel
