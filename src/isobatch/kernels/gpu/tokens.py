"""The tokens that a recorded step begins with: what the host knows, and what was sampled a moment ago.

It is a copy, launched early (`kernels/gpu/overlap.py`), and the launch is worth more than the copy. After a
handful of plain launches in a row the GPU begins most kernels a third of a microsecond later, those of graphs
too, until something is launched early again (ADR 22).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["sampled"])
def _fill_in_kernel(known, places, sampled, to, count, BLOCK: tl.constexpr):
    inputs_ready()
    next_may_begin()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + i, mask=i < count, other=-1)
    token = tl.load(sampled + place, mask=place >= 0, other=0)
    token = tl.where(place >= 0, tl.maximum(token, 0), tl.load(known + i, mask=i < count, other=0))
    tl.store(to + i, token, mask=i < count)


def fill_in(known: torch.Tensor, places: torch.Tensor, sampled: torch.Tensor, to: torch.Tensor) -> None:
    """Gathers the tokens of a step.

    Args:
        known: int64 [T].
        places: int32 [T], the place in `sampled` of each token that is not known; -1 for one that is.
        sampled: int64 [S], -1 for a row that was refused, which counts as token 0.
        to: int64 [T].

    Determinism:
        A copy.
    """
    count = len(to)
    grid = (triton.cdiv(count, _BLOCK),)
    _fill_in_kernel[grid](known, places, sampled, to, count, BLOCK=_BLOCK, num_warps=4, **early())
