"""The noise of sampling by torch's kernels on a GPU: as much work as torch's own, and the numbers of ours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.sampling.triton_noise import rough_exponential, words_of_span

_WIDTH = 1024


@triton.jit
def _fill_kernel(seeds, positions, out, V, WIDTH: tl.constexpr):
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    word = words_of_span(tl.load(seeds + row), tl.load(positions + row), start, WIDTH)
    ids = start + tl.arange(0, WIDTH)
    tl.store(out + row * V + ids, rough_exponential(word), mask=ids < V)


def exponential_noise(seed: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """As `kernels/sampling/cpu.py` has it, within the last bits, on the device of the seeds."""
    out = torch.empty(len(seed), vocabulary, dtype=torch.float32, device=seed.device)
    grid = (len(seed), triton.cdiv(vocabulary, _WIDTH))
    _fill_kernel[grid](seed, position, out, vocabulary, WIDTH=_WIDTH)
    return out
