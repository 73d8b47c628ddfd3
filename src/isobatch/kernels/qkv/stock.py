"""What comes before attention, as PyTorch has it on a GPU: norms, rotation, keys and values stored."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from isobatch.kernels.gpu.compiled import compiled
from isobatch.kernels.layout import PagedRows
from isobatch.kernels.rms_norm.stock import rms_norm
from isobatch.kernels.rotary.stock import rotary_in_dtype
from isobatch.kernels.stock import DenseCache


def qk_norm_rotary_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: DenseCache,
    rows: PagedRows,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """The queries, [T, H, D]; see `Ops.qk_norm_rotary_write`."""
    places = cache.k.flatten(0, 1), cache.v.flatten(0, 1)
    q: torch.Tensor = _compiled()(qkv, positions, cos, sin, *places, rows.slots, q_weight, k_weight, eps)
    return q, None


@cache
def _compiled() -> Any:
    return compiled(_chain)


def _chain(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    _, kv_heads, D = keys.shape
    heads = qkv.view(qkv.shape[0], -1, D)
    q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps)[0], rms_norm(k, k_weight, eps)[0]
    keys[slots] = rotary_in_dtype(k, positions, cos, sin)
    values[slots] = v
    return rotary_in_dtype(q, positions, cos, sin)
