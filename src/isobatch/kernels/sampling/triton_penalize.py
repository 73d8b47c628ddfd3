"""Penalties on the GPU: float32 logits, the CPU's arithmetic to the bit. S rows, V vocabulary, E entries.

Written order, for each token seen: x = x / repetition if x > 0 else x * repetition;
x = x - frequency * count; x = x - presence if count > 0. Each step rounded on its own, as IEEE says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.elementary import UNFUSED
from isobatch.kernels.sampling.cpu import PenaltyRows

_AT_ONCE = tl.constexpr(256)


@triton.jit(do_not_specialize=["E"])
def _penalize_kernel(
    logits, ids, counts, repetition, presence, frequency, out, stride, E, V: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WIDTH
    at = first + tl.arange(0, WIDTH)
    tl.store(out + row * V + at, tl.load(logits + row * stride + at, mask=at < V), mask=at < V)
    # The copy is this program's own, and has to be there before entries are written over it.
    tl.debug_barrier()
    r, p, f = tl.load(repetition + row), tl.load(presence + row), tl.load(frequency + row)
    for start in range(0, E, _AT_ONCE):
        e = start + tl.arange(0, _AT_ONCE)
        token = tl.load(ids + row * E + e, mask=e < E, other=-1)
        mine = (token >= first) & (token < first + WIDTH) & (token < V)
        count = tl.load(counts + row * E + e, mask=mine, other=0)
        x = tl.load(logits + row * stride + token, mask=mine, other=0.0)
        divided = tl.div_rn(x, r + tl.zeros_like(x))
        x = tl.where(r != 1.0, tl.where(x > 0, divided, x * r), x)
        x = x - f * count.to(tl.float32)
        x = tl.where(count > 0, x - p, x)
        tl.store(out + row * V + token, x, mask=mine)


def penalize_cut(logits: torch.Tensor, rows: PenaltyRows, *, width: int) -> torch.Tensor:
    """`penalize` in pieces of `width` tokens, a power of two."""
    S, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty((S, V), dtype=logits.dtype, device=logits.device)
    if S:
        _penalize_kernel[(S, triton.cdiv(V, width))](
            logits,
            rows.ids.contiguous(),
            rows.counts.contiguous(),
            rows.repetition.contiguous(),
            rows.presence.contiguous(),
            rows.frequency.contiguous(),
            out,
            logits.stride(0),
            rows.ids.shape[1],
            V=V,
            WIDTH=width,
            num_warps=4,
            **UNFUSED,
        )
    return out


def penalize(logits: torch.Tensor, rows: PenaltyRows) -> torch.Tensor:
    """The logits with the penalties applied.

    Args:
        logits: float32 [S, V], rows at any stride.
        rows: what each row has seen, on the same device.

    Returns:
        float32 [S, V], a copy.

    Determinism:
        Row s depends on row s of the inputs alone; the bits are the CPU's.
    """
    return penalize_cut(logits, rows, width=4096)
