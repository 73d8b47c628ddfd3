"""Inputs on which another order of summation cannot hide, the same bits on every machine.

torch's and NumPy's generators may change between versions and CPUs; golden digests need inputs that cannot.
So bits are drawn from SHAKE-256 and put together as floats by hand.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
import torch

from isobatch.kernels.coding import CodedRows, Coding

Kind = Literal["wide", "cancel", "plain"]


def words(name: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Uniform 32-bit words, a function of the name."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), "<u4")


def floats(name: str, *shape: int, kind: Kind = "wide") -> torch.Tensor:
    """Random float32 numbers whose sums depend on their order.

    Args:
        name: the seed; another name, other numbers.
        shape: of the result.
        kind: "plain" spans 2^-3..2^0; "wide" spans 2^-8..2^7, so that small terms lose bits to large ones;
            "cancel" is wide, with each odd element near the negative of the one before, so that what is left
            of a sum is its rounding errors.

    Returns:
        float32, contiguous, CPU; no zeros, no subnormals, no infinities.
    """
    drawn = words(name, math.prod(shape)).copy()
    exponent = (drawn >> 23) & (3 if kind == "plain" else 15)
    biased = 127 - (4 if kind == "plain" else 8) + exponent
    bits = (drawn & np.uint32(0x807FFFFF)) | (biased.astype(np.uint32) << 23)
    out = torch.from_numpy(bits.view(np.float32).reshape(shape).copy())
    if kind == "cancel":
        odd = out[..., 1::2]
        odd.copy_(-out[..., : 2 * odd.shape[-1] : 2] * (1 + 2.0**-10 * odd.sign()))
    return out


def integers(name: str, count: int, below: int) -> torch.Tensor:
    """Random int64 [count] in [0, below)."""
    return torch.from_numpy((words(name, count).astype(np.int64)) % below)


def coded(name: str, coding: Coding, outputs: int, inputs: int) -> CodedRows:
    """A random weight matrix: any code, and scales and offsets of either sign with "wide" exponents."""
    if not coding.group:
        return CodedRows.of(floats(f"{name}/codes", outputs, inputs).to(coding.dtype))
    drawn = words(f"{name}/codes", outputs * inputs) % np.uint32(1 << coding.bits)
    codes = torch.from_numpy(drawn.astype(np.uint8).reshape(outputs, inputs)).view(coding.dtype)
    scales = floats(f"{name}/scales", outputs, coding.groups(inputs))
    offsets = floats(f"{name}/offsets", outputs, coding.groups(inputs)) if coding.has_offsets else None
    return CodedRows(coding, codes, scales, offsets)
