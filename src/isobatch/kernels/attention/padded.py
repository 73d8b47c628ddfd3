"""Chunks side by side in one batch, each as the whole prompt that it ends, for a library that knows no pages.

An entry of the batch is a request. Its keys and values begin at position 0, and so do its queries: those of a
prefix, which this step does not ask for, are zero, and nobody reads their results. All entries are as long as
the longest; what is beyond a request's own end is zero, since a library multiplies what it has masked.

Shape letters: B requests of the batch, L positions of an entry, T query rows, H heads, Hkv key/value heads, D
head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention.gather import gather
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows

_BLOCK = 128  # of the library's, which computes no less


def planned(length: int) -> int:
    """The length that an entry is given: a multiple of an eighth of its order of magnitude, or of a block.

    cuDNN makes a plan for every length and size of batch it meets, which holds everything up for 60 ms
    (measured on an H200). So there are eight lengths from each power of two to the next, and no more.
    """
    step = max(_BLOCK, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


@triton.jit(do_not_specialize=["L"])
def _move_kernel(
    step, batch, requests, query_starts, context_lengths, step_row, L,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Axes: position, entry. BACK: from the batch to the step's rows; otherwise into it, with zeros."""
    position, entry = tl.program_id(0), tl.program_id(1)
    request = entry
    if requests is not None:
        request = tl.load(requests + entry)
    begin, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    row = end - tl.load(context_lengths + request) + position
    i = tl.arange(0, WIDTH)
    asked = i < tl.where((row >= begin) & (row < end), SIZE, 0)
    here = step + row.to(tl.int64) * step_row + i
    there = batch + (entry.to(tl.int64) * L + position) * SIZE + i
    if BACK:
        tl.store(here, tl.load(there, mask=asked), mask=asked)
    else:
        tl.store(there, tl.load(here, mask=asked, other=0.0), mask=i < SIZE)


def _move(
    step: torch.Tensor, batch: torch.Tensor, rows: GpuPagedRows, chosen: tuple[int, ...], back: bool
) -> None:
    B, L = batch.shape[:2]
    size = step.shape[1] * step.shape[2]
    _move_kernel[(L, B)](
        step, batch, rows.requests(chosen), rows.query_starts, rows.context_lengths, step.stride(0), L,
        SIZE=size, WIDTH=triton.next_power_of_2(size), BACK=back, num_warps=4,
    )  # fmt: skip


def into_batch(
    q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, chosen: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of some requests' queries, keys and values.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        cache: of the layer.
        rows: whose `contexts` are exact for the chosen requests.
        chosen: the requests.

    Returns:
        (queries [B, L, H, D], keys [B, L, Hkv, D], values), D contiguous.
    """
    length = planned(max(rows.contexts[r] for r in chosen))
    keys, values, _ = gather(cache, rows, chosen, length)
    queries = torch.empty(len(chosen), length, *q.shape[1:], dtype=q.dtype, device=q.device)
    _move(q if q[0].is_contiguous() else q.contiguous(), queries, rows, chosen, back=False)
    keys, values = (t.view(len(chosen), length, *t.shape[1:]) for t in (keys, values))
    return queries, keys, values


def out_of_batch(batch: torch.Tensor, out: torch.Tensor, rows: GpuPagedRows, chosen: tuple[int, ...]) -> None:
    """Copies the rows that the step asked for to their places.

    Args:
        batch: [B, L, H, D], contiguous.
        out: like q, contiguous; rows of requests that were not chosen are left alone.
        rows: as of `into_batch`.
        chosen: as of `into_batch`.
    """
    _move(out, batch, rows, chosen, back=True)
