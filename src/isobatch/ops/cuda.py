"""Ops of a GPU's queue, whoever's kernels serve them: plain lengths beside tensors, recordings, reading."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from isobatch.errors import UnsupportedOpError
from isobatch.kernels.attention.gpu_rows import GpuPagedRows
from isobatch.kernels.gpu.device import INTERPRETED, device, dtypes
from isobatch.kernels.gpu.tokens import fill_in
from isobatch.kernels.layout import Layout, PagedRows
from isobatch.ops.queued import QueuedOps


def require_dtype(dtype: torch.dtype) -> None:
    """Checks a model's dtype.

    Raises:
        UnsupportedOpError: neither bfloat16 nor float16.
    """
    if dtype not in dtypes():
        expected = " or ".join(map(str, dtypes()))
        raise UnsupportedOpError("no GPU kernels for this dtype", expected=expected, got=dtype)


class CudaOps(QueuedOps):
    """`Ops` whose tensors are on the GPU; nothing here waits for it.

    Args:
        name: "isobatch" or "stock".
        table: the function of each op.
        layout: how those functions want weights and caches.
        dtype: bfloat16 or float16.

    Raises:
        UnsupportedOpError: no GPU that will do.
    """

    def __init__(
        self, name: str, table: Mapping[str, Callable[..., Any]], layout: Layout, dtype: torch.dtype
    ) -> None:
        self._pool: Any = None
        super().__init__(name, table, layout, dtype, device())

    def paged_rows(
        self, starts: list[int], lengths: list[int], tables: list[list[int]], slots: list[int]
    ) -> PagedRows:
        """Also keeps the lengths as plain integers, which decide the launches."""
        rows = super().paged_rows(starts, lengths, tables, slots)
        queries = tuple(after - before for before, after in pairwise(starts))
        return GpuPagedRows(
            rows.query_starts,
            rows.context_lengths,
            rows.block_tables,
            rows.slots,
            queries,
            tuple(lengths),
            settled=True,
        )

    def send(self, numbers: torch.Tensor, to: torch.Tensor) -> None:
        """Copies from pinned memory, so that nothing queued is waited for."""
        to.copy_(numbers if INTERPRETED else numbers.pin_memory(), non_blocking=True)

    def fill_in(
        self, known: torch.Tensor, places: torch.Tensor, sampled: torch.Tensor, to: torch.Tensor
    ) -> None:
        """Gathers them in a kernel of ours, whoever's the others are."""
        fill_in(known, places, sampled, to)

    def decode_rows(
        self, lengths: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, context: int
    ) -> PagedRows:
        """Rows of one query each, as `QueuedOps` says."""
        starts = self.tensor(list(range(len(lengths) + 1)), torch.int32)
        ones, bounds = (1,) * len(lengths), (context,) * len(lengths)
        return GpuPagedRows(starts, lengths, tables, slots, ones, bounds, settled=True)

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
        with _nothing_freed(), torch.cuda.graph(graph, pool=self._pool):
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


@contextmanager
def _nothing_freed() -> Iterator[None]:
    """No garbage is collected: a recording that is destroyed while another is made invalidates it."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
