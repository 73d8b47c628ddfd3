"""What attention's launchers share before a launch: plain ints and one empty tensor, nothing on the device.

Shape letters: T query rows, H heads, Hkv key/value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

import torch
import triton

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows

LOG2_E = 1.4426950408889634
_LEAST_HEADS = 16  # the tensor core's narrow side


def exponent_scale(scale: float) -> float:
    """c of the written order; Triton rounds it to float32."""
    return LOG2_E * scale


def begin(
    q: torch.Tensor, rows: GpuPagedRows, chosen: tuple[int, ...] | None, out: torch.Tensor | None
) -> tuple[tuple[int, ...], torch.Tensor]:
    """(the requests to serve, where to write): all of them, and a new tensor like q, where None is given."""
    if chosen is None:
        chosen = tuple(range(len(rows.queries)))
    return chosen, torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out


def group_shape(q: torch.Tensor, cache: GpuKVCache) -> dict[str, int]:
    """What decode kernels are compiled for: a group's heads, bare and padded, head size, pages' stride."""
    G = q.shape[1] // cache.k.shape[1]
    heads = max(_LEAST_HEADS, triton.next_power_of_2(G))
    return {"block_stride": cache.k.stride(0), "G": G, "D": q.shape[2], "HEADS": heads}
