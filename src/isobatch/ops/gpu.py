"""The same ops by the GPU's certified kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from isobatch.kernels import plan as plans
from isobatch.kernels.attention.gpu_record import attention_for
from isobatch.kernels.attention.gpu_serve import Attention, Tiling
from isobatch.kernels.gated.gpu import Gated
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.data import SHORT
from isobatch.kernels.gpu.device import architecture, device
from isobatch.kernels.gpu.layout import gpu_layout
from isobatch.kernels.gpu.random_weights import random_weights
from isobatch.kernels.layout import Weight
from isobatch.kernels.linear.gpu import Linear
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.qkv.triton import qk_norm_rotary_write
from isobatch.kernels.sampling.triton import sample
from isobatch.ops.cuda import CudaOps, require_dtype
from isobatch.ops.fingerprint import computed_digests, numerics_class_of
from isobatch.ops.gpu_stock import StockGpuOps

_LOG = logging.getLogger("isobatch.ops")
__all__ = ["GpuOps", "StockGpuOps", "device", "gpu_numerics_class", "random_weights"]


class GpuOps(CudaOps):
    """The certified kernels' ops.

    Args:
        dtype: bfloat16 or float16.
        heads: of the model, with key/value heads and head size: for these the library's attention is
            certified now, where no kernel of ours serves prompts faster, and serves if it is a member.

    Attributes:
        products: chooses linear's members.

    Raises:
        UnsupportedOpError: no GPU that will do, or another dtype.
    """

    def __init__(self, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
        require_dtype(dtype)
        self.products = Linear(small_next=True)  # norms and rotations
        table = _table(attention_for(*heads, dtype), self.products)
        super().__init__("isobatch", table, gpu_layout(dtype), dtype)
        self.tiling = Tiling(*heads)

    def prepare(self, weights: Iterable[tuple[Weight, bool]], rows: int, *, logits: bool = False) -> None:
        """Certifies the library's products, and logs which are none of the class's members here."""
        out = torch.float32 if logits else self.dtype
        shapes = {Shape(w.outputs, w.inputs, self.dtype, out, biased) for w, biased in weights}
        for refused in self.products.prepare(sorted(shapes, key=str), plans.buckets(rows)):
            _LOG.warning("linear: not certified here, and dropped for the next in the plan: %s", refused)


def _table(attention: Attention, linear: Linear) -> dict[str, Callable[..., Any]]:
    table = {name: record.member(record.production).function for name, record in GPU_RECORDS.items()}
    return {
        **table,
        "linear": linear,
        "gated": Gated(linear),
        "logits": lambda x, weight: linear(x, weight, out_dtype=torch.float32),
        "qk_norm_rotary_write": qk_norm_rotary_write,
        "attention": attention,
        "sample": sample,
    }


def gpu_numerics_class(dtype: torch.dtype) -> str:
    """Names the numerics class of this GPU's architecture family, from the bits that its kernels give now.

    No digests ship for GPUs: the order inside a tensor-core step is the architecture's, and the compiler is
    part of the rest. So two machines agree where each op has just given the same bits on both.

    Args:
        dtype: bfloat16 or float16.
    """
    suffix = "/" + SHORT[dtype]
    records = {
        name: replace(
            record, variants=tuple(v for v in record.variants if "/" not in v or v.endswith(suffix))
        )
        for name, record in GPU_RECORDS.items()
    }
    return numerics_class_of(architecture(), str(dtype), computed_digests(records=records))
