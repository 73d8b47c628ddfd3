"""The same ops by torch's own kernels on a GPU, as PyTorch would have run them; docs/adr/0021 says which."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from isobatch.kernels.activation.stock import silu_and_mul
from isobatch.kernels.attention.stock_gpu import attention
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.compiled import compiled
from isobatch.kernels.gpu.layout import stock_layout
from isobatch.kernels.linear.stock import logits
from isobatch.kernels.qkv.stock import qk_norm_rotary_write
from isobatch.kernels.rms_norm.stock import rms_norm
from isobatch.kernels.sampling.stock import sample
from isobatch.kernels.sampling.triton_exponential import exponential_noise
from isobatch.ops.cuda import CudaOps, require_dtype


class StockGpuOps(CudaOps):
    """torch's own kernels on the GPU, for comparison: bits that depend on the load.

    Args:
        dtype: bfloat16 or float16.

    Raises:
        UnsupportedOpError: no GPU that will do, or another dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        require_dtype(dtype)
        super().__init__("stock", _table(), stock_layout(dtype), dtype)


def _table() -> dict[str, Callable[..., Any]]:
    return {
        **{name: record.stock.function for name, record in GPU_RECORDS.items() if name != "gated"},
        "logits": logits,
        "rms_norm": compiled(rms_norm),
        "silu_and_mul": compiled(silu_and_mul),
        "qk_norm_rotary_write": qk_norm_rotary_write,
        "attention": attention,
        "sample": partial(sample, noise=exponential_noise),
    }
