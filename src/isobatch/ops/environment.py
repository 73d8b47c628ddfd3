"""Whether the processor's floating-point mode is IEEE's: a thread can be told to take subnormals for zero."""

from __future__ import annotations

import torch

from isobatch.bits import bits_equal
from isobatch.errors import FloatEnvironmentError
from isobatch.kernels.cpu.jit import max_threads
from isobatch.kernels.rotary.cpu import rotary

# (when it may be lost, x, factor, x * factor), x and the product as bits, since a thread that flushes cannot
# even convert them: 2^-140 * 2^20 reads a subnormal number, and 2^-126 / 2 writes one.
_SUBNORMALS = (
    ("read", 1 << 9, 2.0**20, 7 << 23),
    ("written", 1 << 23, 0.5, 1 << 22),
)


def flushed_subnormals() -> tuple[str, ...]:
    """Where subnormal numbers are taken for zero.

    Returns:
        A sentence for each kind of thread and each way; empty if all is well.
    """
    factor = torch.tensor([factor for _, _, factor, _ in _SUBNORMALS])
    x, expected = (
        torch.tensor([row[i] for row in _SUBNORMALS], dtype=torch.int32).view(torch.float32) for i in (1, 3)
    )
    # A rotation by no angle multiplies by its cosine; enough rows for every thread to get some.
    positions = torch.arange(len(_SUBNORMALS)).repeat(64 * max_threads())
    pairs = x[positions].reshape(-1, 1, 1).repeat(1, 1, 2)
    turned = rotary(pairs, positions, factor[:, None], torch.zeros(len(x), 1))
    places = {"the Python thread": (x * factor, expected)}
    places["the kernel threads"] = (turned, expected[positions].reshape(-1, 1, 1).repeat(1, 1, 2))
    return tuple(
        f"{place}: subnormal numbers are taken for zero when {what}; undo torch.set_flush_denormal(True), or "
        "find the library, built with -ffast-math, that switched it on"
        for place, (got, want) in places.items()
        for i, (what, *_) in enumerate(_SUBNORMALS)
        if not bits_equal(got[i :: len(_SUBNORMALS)], want[i :: len(_SUBNORMALS)])
    )


def require_ieee() -> None:
    """Refuses a process whose arithmetic is not IEEE's: its bits would not be those of the fingerprint.

    Raises:
        FloatEnvironmentError: subnormal numbers are flushed somewhere.
    """
    if failures := flushed_subnormals():
        raise FloatEnvironmentError(failures[0])
