"""The paged key/value cache of one layer, as the CPU kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isobatch.kernels.cpu.jit import empty
from isobatch.kernels.layout import PAGE


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one layer.

    Args:
        k: float32 [blocks, Hkv, D, 16]: keys run along the last axis, so that scores vectorise over keys.
        v: float32 [blocks, Hkv, 16, D]: head columns run along the last axis, so that outputs do.
    """

    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def empty(cls, blocks: int, kv_heads: int, head_size: int) -> KVCache:
        """Uninitialised memory: no kernel reads a slot that was not written for the same request."""
        k, _ = empty(blocks, kv_heads, head_size, PAGE)
        v, _ = empty(blocks, kv_heads, PAGE, head_size)
        return cls(k, v)
