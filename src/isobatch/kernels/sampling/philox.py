"""Philox4x32-10: random numbers that are a function of a key and a counter, with no state to share.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

from isobatch.kernels.cpu.jit import device

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


@device
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds over a 128-bit counter under a 64-bit key; four uint32 words."""
    for _ in range(10):
        p0, p1 = M0 * np.uint64(c0), M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(np.uint32(p1 >> _32) ^ c1 ^ k0),
            np.uint32(p1 & _LOW),
            np.uint32(np.uint32(p0 >> _32) ^ c3 ^ k1),
            np.uint32(p0 & _LOW),
        )
        k0, k1 = np.uint32(k0 + W0), np.uint32(k1 + W1)
    return c0, c1, c2, c3


@device
def noise_words(seed, position, group):
    """The 32 random bits of (seed, position, token) for the four tokens 4 * group + 0, 1, 2, 3."""
    key = np.uint64(seed)
    return philox(
        np.uint32(group),
        np.uint32(position),
        np.uint32(0),
        np.uint32(0),
        np.uint32(key & _LOW),
        np.uint32(key >> _32),
    )
