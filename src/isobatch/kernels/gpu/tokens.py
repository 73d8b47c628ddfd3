"""Tokens that one step has sampled, brought to where the next one looks for them.

It is a copy, launched early (`kernels/gpu/overlap.py`), and the launch is worth more than the copy. After a
handful of plain launches in a row the GPU begins every kernel a third of a microsecond later, those of graphs
too, until something is launched early again (ADR 22).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["tokens", "to"])
def _handed_on_kernel(tokens, to, count, BLOCK: tl.constexpr):
    inputs_ready()
    next_may_begin()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + i, tl.maximum(tl.load(tokens + i, mask=i < count), 0), mask=i < count)


def hand_on(tokens: torch.Tensor, to: torch.Tensor) -> None:
    """Copies tokens, 0 for each that is negative.

    Args:
        tokens: int64 [S], -1 for a row that was refused.
        to: int64 [S] or longer.

    Determinism:
        A copy.
    """
    if count := len(tokens):
        grid = (triton.cdiv(count, _BLOCK),)
        _handed_on_kernel[grid](tokens, to, count, BLOCK=_BLOCK, num_warps=4, **early())
