"""Random weights on the GPU: the numbers of kernels/cpu/random_weights.py, made where they are to lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.cpu import random_weights as cpu
from isobatch.kernels.gpu.device import device
from isobatch.kernels.sampling.triton_noise import noise_words

_PART, _PARTS, _MEAN, _SCALE = (tl.constexpr(n) for n in (cpu.PART, cpu.PARTS, cpu.MEAN, cpu.SCALE))
_MASK = tl.constexpr((1 << cpu.PART) - 1)
_GROUPS = 512


@triton.jit
def _number(word):
    total = tl.zeros(word.shape, tl.int32) - _MEAN
    for part in tl.static_range(_PARTS):
        total += ((word >> (_PART * part)) & _MASK).to(tl.int32)
    return total.to(tl.float32) * _SCALE


@triton.jit(do_not_specialize=["key", "start", "count", "zero"])
def _fill_kernel(out, key, start, count, zero, GROUPS: tl.constexpr):
    # Small arguments come as 32 bits.
    key, start = key.to(tl.int64), start.to(tl.int64)
    first = start // 4 + tl.program_id(0).to(tl.int64) * GROUPS
    a, b, c, d = noise_words(key, zero, first + tl.arange(0, GROUPS))
    # Four numbers of each group side by side.
    numbers = tl.interleave(
        tl.interleave(_number(a), _number(c)),
        tl.interleave(_number(b), _number(d)),
    )
    at = first * 4 + tl.arange(0, 4 * GROUPS) - start
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=(at >= 0) & (at < count))


def random_weights(key: int, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """As on the CPU (kernels/cpu/random_weights.py), straight to the device of the GPU kernels."""
    out = torch.empty(count, dtype=dtype, device=device())
    groups = -(-(start + count) // 4) - start // 4
    _fill_kernel[(triton.cdiv(groups, _GROUPS),)](out, key, start, count, 0, GROUPS=_GROUPS, num_warps=4)
    return out
