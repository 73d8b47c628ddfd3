"""Whether this process computes as IEEE 754 says: nothing is flushed to zero, and all is rounded to nearest.

Both are modes of a thread, which a library may switch on and a thread passes on to those that it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isobatch.bits import bits_equal
from isobatch.errors import FloatEnvironmentError
from isobatch.kernels.cpu.jit import SMALL, max_threads, require_threads
from isobatch.kernels.rotary.cpu import rotary

_FLUSHED = (
    "subnormal numbers are taken for zero when {}; undo torch.set_flush_denormal(True), or "
    "find the library, built with -ffast-math, that switched it on"
)
_ROUNDED = "{} are not rounded to the nearest number; undo fesetround, or find the library that called it"


@dataclass(frozen=True, slots=True)
class _Probe:
    """A rotation of (a, b), whose first half is a * cos - b * sin, with what it must give.

    All as the bits of float32 numbers, since a thread that flushes cannot even convert a subnormal one.
    """

    wrong: str
    a: int
    b: int
    cos: int
    sin: int
    expected: int


_ONE, _MINUS_ONE, _TINY, _MINUS_TINY = 0x3F800000, 0xBF800000, 0x33800000, 0xB3800000
_PROBES = (
    _Probe(_FLUSHED.format("read"), 1 << 9, 0, 0x49800000, 0, 7 << 23),  # 2^-140 * 2^20
    _Probe(_FLUSHED.format("written"), 1 << 23, 0, 0x3F000000, 0, 1 << 22),  # 2^-126 * 2^-1
    # 1 + 2^-24 lies half-way to the next number, and -(1 + 2^-24) likewise: to even, that is back to 1.
    _Probe(_ROUNDED.format("sums"), _ONE, _MINUS_TINY, _ONE, _ONE, _ONE),
    _Probe(_ROUNDED.format("sums"), _MINUS_ONE, _TINY, _ONE, _ONE, _MINUS_ONE),
    # (1 + 2^-12) * (1 + 3 * 2^-12) lies half-way as well, and to even is up here: so truncation shows too.
    _Probe(_ROUNDED.format("products"), 0x3F800800, 0, 0x3F801800, 0, 0x3F802002),
)

# The same for the float64 of Python itself, which obeys the same mode. Not literals in the expressions below:
# those the compiler of Python would work out, in whatever mode it once ran.
_UNIT, _HALF_STEP, _SMALLEST, _LARGE = 1.0, 2.0**-53, 2.0**-1022, 2.0**60


def deviations() -> tuple[str, ...]:
    """Where the arithmetic of this process is not IEEE 754's.

    Returns:
        A sentence for each way, of the calling thread if that has any, else of the kernel threads; empty if
        all is well.
    """

    def column(name: str) -> torch.Tensor:
        bits = [getattr(probe, name) for probe in _PROBES]
        return torch.tensor(bits, dtype=torch.int64, device="cpu").to(torch.int32).view(torch.float32)

    a, b, cos, sin, expected = map(column, ("a", "b", "cos", "sin", "expected"))
    if here := _wrong("the Python thread", a * cos - b * sin, expected):
        return here  # kernel threads that it starts now would take its modes, and keep them
    # Too many rows for one thread alone, and some for each.
    positions = torch.arange(len(_PROBES), device="cpu").repeat(SMALL * max_threads())
    turned = rotary(torch.stack((a, b), 1)[positions][:, None], positions, cos[:, None], sin[:, None])
    return _wrong("the kernel threads", turned[:, 0, 0].contiguous(), expected[positions])


def _wrong(place: str, got: torch.Tensor, expected: torch.Tensor) -> tuple[str, ...]:
    """A sentence for each way in which results, those of the probes in turn, are wrong."""
    step = len(_PROBES)
    ways = (p.wrong for i, p in enumerate(_PROBES) if not bits_equal(got[i::step], expected[i::step]))
    return tuple(f"{place}: {wrong}" for wrong in dict.fromkeys(ways))


def require_ieee() -> None:
    """Refuses a process whose arithmetic is not IEEE's: its bits would not be those of the fingerprint.

    Raises:
        FloatEnvironmentError: on some thread subnormal numbers are flushed, or rounding is not to nearest.
        ConfigError, ForkedProcessError: kernels cannot run here at all.
    """
    require_threads()
    if failures := deviations():
        raise FloatEnvironmentError(failures[0])


def require_ieee_here() -> None:
    """The same for the calling thread alone, in less than a microsecond: what is asked before each step.

    Raises:
        FloatEnvironmentError: this thread flushes subnormal numbers, or does not round to nearest.
        ConfigError, ForkedProcessError: kernels cannot run here at all.
    """
    require_threads()
    if _UNIT + _HALF_STEP != _UNIT or -_UNIT - _HALF_STEP != -_UNIT or _UNIT - _HALF_STEP / 2 != _UNIT:
        raise FloatEnvironmentError(f"the Python thread: {_ROUNDED.format('sums')}")
    if _SMALLEST / 2 * _LARGE == 0:  # written, then read
        raise FloatEnvironmentError(f"the Python thread: {_FLUSHED.format('written or read')}")
