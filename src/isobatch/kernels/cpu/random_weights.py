"""Random weights on the CPU: each number a function of a key and its own place, the same on every machine.

Number i is the sum of four 6-bit parts of word i of `noise_words` under the key, less its mean of 126, times
2^-11. So it is nearly normal, of standard deviation 0.018, and exact in float32, bfloat16 and float16 alike:
a model of such weights has the same ones in every dtype and on every device.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.cpu.jit import empty, kernel
from isobatch.kernels.sampling.philox import noise_words

PART, PARTS, MEAN, SCALE = 6, 4, 126, 2.0**-11
"""Bits of a part; parts that are added; what is taken off their sum; what a unit of it stands for."""
_GROUP = 4  # numbers from one call of the generator
_SCALE = np.float32(SCALE)
_MASK = np.uint32((1 << PART) - 1)


@kernel
def _fill(key, start, out):
    first, stop = start // _GROUP, (start + out.shape[0] + _GROUP - 1) // _GROUP
    for group in prange(first, stop):
        for lane, word in enumerate(noise_words(key, 0, group)):
            at = group * _GROUP + lane - start
            if 0 <= at < out.shape[0]:
                total = np.int32(-MEAN)
                for part in range(PARTS):
                    total += np.int32((word >> np.uint32(PART * part)) & _MASK)
                out[at] = np.float32(total) * _SCALE


def random_weights(key: int, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers start to start + count of an endless row of them.

    Args:
        key: which row, from 0 to 2^63 - 1.
        start: the first number, below 2^34.
        count: how many.
        dtype: float32, bfloat16 or float16, which hold the numbers exactly.

    Returns:
        [count], CPU.

    Determinism:
        Number i depends on the key and i alone.
    """
    numbers, out = empty(count)
    _fill(np.int64(key), np.int64(start), out)
    return numbers.to(dtype)
