"""The parts of a decoder of the Llama family, on `ops` alone.

Shape letters: T tokens, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from isobatch.kernels.layout import Cache, Stack, Weight
from isobatch.kernels.moe.experts import Experts
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
        weight: [K], in the dtype of the ops.
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
        qkv_bias: [(H + 2 Hkv) D], or None.
        out: [hidden, H D].
        out_bias: [hidden], or None.
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

    def __call__(
        self,
        ops: Ops,
        x: torch.Tensor,
        batch: Batch,
        cache: Cache,
        rotary: Rotary,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x, [T, hidden], attended; stores this step's keys and values in the cache.

        With `wanted`, int64 [S], only those rows of the result.
        """
        qkv = ops.linear(x, self.qkv, self.qkv_bias)
        q_norm, k_norm = self.q_norm, self.k_norm
        q, own = ops.qk_norm_rotary_write(
            qkv,
            self.heads,
            batch.positions,
            rotary.cos,
            rotary.sin,
            cache,
            batch.rows,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
        )
        attended = ops.attention(q, cache, batch.rows, 1 / math.sqrt(self.head_size), own)
        if wanted is not None:
            attended = attended[wanted]
        return ops.linear(attended.flatten(1), self.out, self.out_bias)


@dataclass(frozen=True, slots=True)
class MLP:
    """down(silu(gate x) * up x).

    Args:
        gate_up: [2 I, hidden], gates above ups, as `Ops.gate_up` lays them out.
        down: [hidden, I].
    """

    gate_up: Weight
    down: Weight

    def __call__(self, ops: Ops, x: torch.Tensor) -> torch.Tensor:
        """x, [T, hidden], transformed."""
        return ops.linear(ops.gated(x, self.gate_up), self.down)


@dataclass(frozen=True, slots=True)
class SparseMLP:
    """The sum of a few of many MLPs, which a router chooses for each token."""

    experts: Experts[Weight, Stack]

    def __call__(self, ops: Ops, x: torch.Tensor) -> torch.Tensor:
        """x, [T, hidden], transformed."""
        return ops.moe(x, self.experts)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, pre-norm."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP | SparseMLP

    @property
    def products(self) -> list[tuple[Weight, bool]]:
        """The weights that `linear` multiplies with, and whether each has a bias."""
        attention = self.attention
        found = [
            (attention.qkv, attention.qkv_bias is not None),
            (attention.out, attention.out_bias is not None),
        ]
        if isinstance(self.mlp, MLP):
            found += [(self.mlp.gate_up, False), (self.mlp.down, False)]
        return found
