"""The same ops by the GPU's certified kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from isobatch.errors import UnsupportedOpError
from isobatch.kernels.attention.gpu_record import certify_library
from isobatch.kernels.attention.gpu_rows import GpuPagedRows
from isobatch.kernels.attention.gpu_serve import Attention
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.data import SHORT
from isobatch.kernels.gpu.device import INTERPRETED, architecture, device, dtypes
from isobatch.kernels.gpu.layout import gpu_layout
from isobatch.kernels.gpu.random_weights import random_weights
from isobatch.kernels.layout import PagedRows
from isobatch.kernels.linear.gpu import Linear
from isobatch.kernels.qkv.triton import qk_norm_rotary_write
from isobatch.kernels.sampling.triton import sample
from isobatch.ops.fingerprint import computed_digests, numerics_class_of
from isobatch.ops.queued import QueuedOps

__all__ = ["GpuOps", "device", "gpu_numerics_class", "random_weights"]


class GpuOps(QueuedOps):
    """`Ops` whose tensors are on the GPU; nothing here waits for it.

    Args:
        dtype: bfloat16 or float16.
        heads: of the model, with key/value heads and head size: for these the library's attention is
            certified now, and serves whole prompts if it is a member.

    Raises:
        UnsupportedOpError: no GPU that will do, or another dtype.
    """

    def __init__(self, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
        if dtype not in dtypes():
            expected = " or ".join(map(str, dtypes()))
            raise UnsupportedOpError("no GPU kernels for this dtype", expected=expected, got=dtype)
        self._pool: Any = None
        library = not INTERPRETED and certify_library(*heads, dtype).member
        super().__init__("isobatch", _table(Attention(library=library)), gpu_layout(dtype), dtype, device())

    def paged_rows(
        self, starts: list[int], lengths: list[int], tables: list[list[int]], slots: list[int]
    ) -> PagedRows:
        """Also keeps the lengths as plain integers, which decide the launches."""
        rows = super().paged_rows(starts, lengths, tables, slots)
        queries = tuple(after - before for before, after in pairwise(starts))
        return GpuPagedRows(
            rows.query_starts, rows.context_lengths, rows.block_tables, rows.slots, queries, tuple(lengths)
        )

    def decode_rows(
        self, lengths: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, context: int
    ) -> PagedRows:
        """Rows of one query each, as `QueuedOps` says."""
        starts = self.tensor(list(range(len(lengths) + 1)), torch.int32)
        ones, bounds = (1,) * len(lengths), (context,) * len(lengths)
        return GpuPagedRows(starts, lengths, tables, slots, ones, bounds)

    def recorded(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Records work as a CUDA graph."""
        result = work()
        if INTERPRETED:  # no graphs there; running it again is what a replay does

            def again() -> None:
                result.copy_(work())

            return again, result
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()

        def replay(_inputs: object = work) -> None:
            graph.replay()

        # The work is kept with it: what a recording reads must live as long as the recording.
        return replay, result

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copies to pinned memory behind what is queued."""
        if INTERPRETED:
            copy = tensor.clone()
            return lambda: copy
        here = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        here.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> torch.Tensor:
            arrived.synchronize()
            return here

        return wait


def _table(attention: Attention) -> dict[str, Callable[..., Any]]:
    linear = Linear()
    table = {name: record.member(record.production).function for name, record in GPU_RECORDS.items()}
    return {
        **table,
        "linear": linear,
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
