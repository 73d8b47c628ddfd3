"""The faults that servers have, planted in our own GPU kernels: one step replaced, all else kept.

So what a test refuses is that step, not a kernel that somebody wrote for the test; and the same kernel, taken
apart and put together again without the fault, must be admitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention import triton as attention
from isobatch.kernels.attention.triton_steps import lane_sums, softmax_block
from isobatch.kernels.gpu.rows import fold
from isobatch.kernels.linear.triton import linear_plain
from isobatch.kernels.moe import triton as moe
from isobatch.kernels.moe.routing import Routing
from isobatch.kernels.registry import Member
from isobatch.kernels.rms_norm import triton as rms_norm
from isobatch.kernels.sampling import triton as sampling
from isobatch.kernels.sampling.triton_noise import noisiest, words_of, words_of_span
from isobatch.kernels.stock import DenseWeight


def rebuilt(kernel: Any, **steps: Any) -> Any:
    """The kernel with some of the functions that it calls by name replaced."""
    old = kernel.fn
    new = FunctionType(old.__code__, {**old.__globals__, **steps}, old.__name__, old.__defaults__)
    new.__annotations__, new.__kwdefaults__ = old.__annotations__, old.__kwdefaults__
    return triton.jit(new)


def launching(member: Member, module: ModuleType, kernels: Mapping[str, Any]) -> Member:
    """The member, whose launcher finds these in place of its module's own."""

    def function(**arguments: Any) -> Any:
        with patch.multiple(module, **kernels):
            return member.function(**arguments)

    return replace(member, name=f"{member.name}, rebuilt", function=function)


def by_load(many: Member, few: Member, rows: int) -> Member:
    """The choice that load makes in a server: one member up to so many rows, the other beyond."""

    def function(**arguments: Any) -> Any:
        first = next(iter(arguments.values()))
        return (few if len(first) <= rows else many).function(**arguments)

    return replace(many, name=f"{few.name} up to {rows} rows", function=function)


# A row sum that follows the layout: threads first, then lanes of a warp, then warps.


@triton.jit
def _lanes_across_warps(p, ROWS: tl.constexpr):
    total = tl.sum(p, 1)
    return tl.where((tl.arange(0, 4) == 0)[None, :], total[:, None], 0.0)


@triton.jit
def _fold_across_warps(x, WARPS: tl.constexpr = 1):
    return tl.sum(x, 1)


def attention_summing(step: Any) -> Mapping[str, Any]:
    block = rebuilt(softmax_block, lane_sums=step)
    blocks = rebuilt(attention._attend_blocks, softmax_block=block)
    tile = rebuilt(attention.attend_tile, _attend_blocks=blocks)
    return {"_attention_kernel": rebuilt(attention._attention_kernel, attend_tile=tile)}


def norm_summing(step: Any) -> Mapping[str, Any]:
    return {"_rms_norm_kernel": rebuilt(rms_norm._rms_norm_kernel, fold=step)}


# Noise whose counter or key is the place in the batch.


@triton.jit
def _span_by_slot(seed, position, start, WIDTH: tl.constexpr):
    return words_of_span(seed, tl.program_id(0).to(tl.int64), start, WIDTH)


@triton.jit
def _word_by_slot(seed, position, ids):
    return words_of(seed, tl.program_id(0).to(tl.int64), ids)


@triton.jit
def _span_seeded_by_slot(seed, position, start, WIDTH: tl.constexpr):
    return words_of_span(tl.program_id(0).to(tl.int64), position, start, WIDTH)


@triton.jit
def _word_seeded_by_slot(seed, position, ids):
    return words_of(tl.program_id(0).to(tl.int64), position, ids)


def noise_from(span: Any, word: Any) -> Mapping[str, Any]:
    last = rebuilt(noisiest, words_of=word)
    return {"_noise_kernel": rebuilt(sampling._noise_kernel, words_of_span=span, noisiest=last)}


# Results added in the order in which they come.


_combine = moe.combine


def _last_comes_first(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The expert of the highest id was ready before the others."""
    return _combine(y, replace(routing, rows=routing.rows.roll(1, 1), weights=routing.weights.roll(1, 1)))


def _by_atomics(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """index_add_, which on a GPU adds by atomics: whoever comes first is added first."""
    scaled = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    scaled[routing.rows.flatten().long()] = routing.weights.flatten()[:, None]
    scaled *= y.float()
    out = torch.zeros(len(routing.rows), y.shape[1], dtype=torch.float32, device=y.device)
    return out.index_add_(0, routing.tokens.long(), scaled).to(y.dtype)


# K split in two and the parts added, where rows are few.


def split_by_load(x: torch.Tensor, weight: DenseWeight, bias: Any = None, out_dtype: Any = None) -> Any:
    """What load makes of a GEMM in a server: with few rows, K is split in two, and the parts are added."""
    if len(x) > 8:
        return linear_plain(x, weight, bias, out_dtype)
    half = x.shape[1] // 2
    parts = [
        linear_plain(x[:, part], DenseWeight(weight.dense[:, part]), None, torch.float32)
        for part in (slice(0, half), slice(half, None))
    ]
    total = parts[0] + parts[1]
    return (total if bias is None else total + bias.float()).to(out_dtype or x.dtype)


ATTENTION_SUM = (attention, attention_summing(_lanes_across_warps), attention_summing(lane_sums))
NORM_SUM = (rms_norm, norm_summing(_fold_across_warps), norm_summing(fold))
NOISE_BY_SLOT = (sampling, noise_from(_span_by_slot, _word_by_slot), noise_from(words_of_span, words_of))
SEED_BY_SLOT = (
    sampling,
    noise_from(_span_seeded_by_slot, _word_seeded_by_slot),
    noise_from(words_of_span, words_of),
)
ARRIVAL = (moe, {"combine": _last_comes_first}, {"combine": _combine})
ATOMICS = (moe, {"combine": _by_atomics}, {"combine": _combine})
"""Each: the module, its kernels with the fault, and the same taken apart and put together without it."""
