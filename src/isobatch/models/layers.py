"""The parts of a decoder of the Llama family, on `ops` alone.

Shape letters: T tokens, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from isobatch.kernels.layout import Cache, Weight
from isobatch.models.inputs import Batch
from isobatch.ops import Ops


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosines and sines, float32 [context, D/2] each."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm.

    Args:
        weight: float32 [K].
        eps: added to the mean square.
    """

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention.

    Args:
        qkv: [(H + 2 Hkv) D, hidden]: queries, keys and values side by side. One product instead of three
            gives the same bits, because each output is a sum of its own.
        qkv_bias: float32 [(H + 2 Hkv) D], or None.
        out: [hidden, H D].
        out_bias: float32 [hidden], or None.
        q_norm: over each query head (Qwen3), or None.
        k_norm: over each key head, or None.
        heads: H.
        kv_heads: Hkv.
        head_size: D.
    """

    qkv: Weight
    qkv_bias: torch.Tensor | None
    out: Weight
    out_bias: torch.Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    kv_heads: int
    head_size: int

    def __call__(self, ops: Ops, x: torch.Tensor, batch: Batch, cache: Cache, rotary: Rotary) -> torch.Tensor:
        """x, float32 [T, hidden], attended; stores this step's keys and values in the cache."""
        heads, kv_heads = self.heads, self.kv_heads
        packed = ops.linear(x, self.qkv, self.qkv_bias).view(x.shape[0], -1, self.head_size)
        turned, v = packed.split_with_sizes((heads + kv_heads, kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned.split_with_sizes((heads, kv_heads), 1)
            turned = torch.cat((_normed(ops, q, self.q_norm), _normed(ops, k, self.k_norm)), 1)
        turned = ops.rotary(turned, batch.positions, rotary.cos, rotary.sin)
        q, k = turned.split_with_sizes((heads, kv_heads), 1)
        ops.write_kv(k, v, cache, batch.rows)
        attended = ops.attention(q, cache, batch.rows, 1 / math.sqrt(self.head_size))
        return ops.linear(attended.flatten(1), self.out, self.out_bias)


def _normed(ops: Ops, heads: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Each head of [T, H, D] normalised on its own."""
    return ops.rms_norm(heads.flatten(0, 1), norm.weight, norm.eps)[0].view(heads.shape)


@dataclass(frozen=True, slots=True)
class MLP:
    """down(silu(gate x) * up x).

    Args:
        gate_up: [2 I, hidden], gates above ups.
        down: [hidden, I].
    """

    gate_up: Weight
    down: Weight

    def __call__(self, ops: Ops, x: torch.Tensor) -> torch.Tensor:
        """x, float32 [T, hidden], transformed."""
        return ops.linear(ops.silu_and_mul(ops.linear(x, self.gate_up)), self.down)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, pre-norm."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP
