"""Embedding lookup on the GPU: a copy of rows, in pieces of any size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.stock import DenseWeight


@triton.jit
def _embedding_kernel(ids, weight, out, weight_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    inputs_ready()
    next_may_begin()
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(weight + tl.load(ids + t) * weight_stride + c, mask=c < K)
    tl.store(out + t * K + c, row, mask=c < K)


def embedding_tiled(token_ids: torch.Tensor, weight: DenseWeight, *, most: int) -> torch.Tensor:
    """`embedding` in pieces of at most `most` columns."""
    table = weight.dense
    K = table.shape[1]
    out = torch.empty((len(token_ids), K), dtype=table.dtype, device=table.device)
    block = min(most, triton.next_power_of_2(K))
    if len(token_ids):
        grid = (len(token_ids), triton.cdiv(K, block))
        _embedding_kernel[grid](
            token_ids.contiguous(), table, out, table.stride(0), K=K, BLOCK=block, num_warps=4, **early()
        )
    return out


def embedding(token_ids: torch.Tensor, weight: DenseWeight) -> torch.Tensor:
    """Row token_ids[t] of the weight for each t.

    Args:
        token_ids: int64 [T], each below V (the caller has checked: nothing here asks the GPU).
        weight: [V, K], any dtype.

    Returns:
        [T, K] of the weight's dtype.

    Determinism:
        A copy.
    """
    return embedding_tiled(token_ids, weight, most=2048)
