"""Mixture of experts on the CPU, float32.

Written order. Router: linear's (kernels/linear/cpu.py), so float32 throughout. The chosen experts are the
`active` largest logits, ties to the lowest id; NaN ranks as infinity, so that its token comes out as NaN and
no expert is chosen twice. e_i = exp(logit_i - max); a chosen expert's weight is e_i over a sum of e's, from
zero and in ascending expert id: of the chosen experts if weights are renormalised, else of all. An expert's
products are linear's, with silu_and_mul between them. A token's results are combined from zero in ascending
expert id: acc = acc + weight * y, each step rounded.

Tokens are gathered by expert, and within one keep their order; linear's rows never meet in a sum, so how many
an expert gets is of no account.

Shape letters: T tokens, E experts, A active experts per token, K hidden width, I inner width.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.activation.cpu import silu_and_mul
from isobatch.kernels.cpu.elementary import exp
from isobatch.kernels.cpu.jit import array, device, empty, kernel
from isobatch.kernels.linear.cpu import linear_row, linear_tiles
from isobatch.kernels.linear.weight import PackedStack, PackedWeight
from isobatch.kernels.moe.experts import Experts

CpuExperts = Experts[PackedWeight, PackedStack]


@device
def _rank(logit):
    return logit if logit == logit else np.float32(np.inf)


@kernel
def _choose(logits, renormalise, chosen, weights):
    T, E = logits.shape
    A = chosen.shape[1]
    for t in prange(T):
        taken, powers = np.zeros(E, np.bool_), np.empty(E, np.float32)
        top = _rank(logits[t, 0])
        for e in range(1, E):
            top = max(top, _rank(logits[t, e]))
        for _ in range(A):
            best = -1
            for e in range(E):
                if not taken[e] and (best < 0 or _rank(logits[t, e]) > _rank(logits[t, best])):
                    best = e
            taken[best] = True
        total = np.float32(0)
        for e in range(E):
            powers[e] = exp(logits[t, e] - top)
            if taken[e] or not renormalise:
                total = total + powers[e]
        slot = 0
        for e in range(E):
            if taken[e]:
                chosen[t, slot] = e
                weights[t, slot] = powers[e] / total
                slot += 1


@kernel
def _sort(chosen, starts, rows, tokens):
    """By expert, and within one by token. starts: [E + 1]."""
    T, A = chosen.shape
    E = starts.shape[0] - 1
    starts[:] = 0
    for t in range(T):
        for s in range(A):
            starts[chosen[t, s] + 1] += 1
    for e in range(E):
        starts[e + 1] += starts[e]
    free = starts[:E].copy()
    for t in range(T):
        for s in range(A):
            row = free[chosen[t, s]]
            free[chosen[t, s]] = row + 1
            rows[t, s] = row
            tokens[row] = t


@kernel
def _combine(y, weights, rows, out):
    T, K = out.shape
    for t in prange(T):
        for k in range(K):
            out[t, k] = np.float32(0)
        for s in range(rows.shape[1]):
            weight, row = weights[t, s], rows[t, s]
            for k in range(K):
                out[t, k] = out[t, k] + weight * y[row, k]


def choose(logits: torch.Tensor, active: int, *, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, ascending, and what their results count.

    Args:
        logits: float32 [T, E].
        active: A.
        renormalise: see `Experts`.

    Returns:
        int64 [T, A] and float32 [T, A].
    """
    chosen = torch.empty(len(logits), active, dtype=torch.int64, device="cpu")
    weights, weights_array = empty(len(logits), active)
    _choose.sized(logits.numel())(array(logits), renormalise, chosen.numpy(), weights_array)
    return chosen, weights


def combine(y: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The sum of each token's results, in the order of its slots.

    Args:
        y: float32 [T A, K].
        weights: float32 [T, A].
        rows: int64 [T, A], the row of y that each slot has.
    """
    out, out_array = empty(len(rows), y.shape[1])
    _combine.sized(y.numel())(array(y), array(weights), array(rows), out_array)
    return out


def moe_by_expert(x: torch.Tensor, experts: CpuExperts) -> torch.Tensor:
    """The fast member: the tokens of an expert together, so that its weights are read once."""
    logits = linear_tiles(x, experts.router)
    chosen, weights = choose(logits, experts.active, renormalise=experts.renormalise)
    starts = torch.empty(logits.shape[1] + 1, dtype=torch.int64, device="cpu")
    rows, tokens = torch.empty_like(chosen), chosen.new_empty(chosen.numel())
    _sort.sized(0)(chosen.numpy(), starts.numpy(), rows.numpy(), tokens.numpy())
    y = x.new_empty(chosen.numel(), x.shape[1])
    bounds = starts.tolist()
    for e, (gate_up, down) in enumerate(zip(experts.gate_up.weights, experts.down.weights, strict=True)):
        first, last = bounds[e], bounds[e + 1]
        if first < last:
            inner = silu_and_mul(linear_tiles(x[tokens[first:last]], gate_up))
            y[first:last] = linear_tiles(inner, down)
    return combine(y, weights, rows)


def moe_by_token(x: torch.Tensor, experts: CpuExperts) -> torch.Tensor:
    """The canonical member: a token at a time, an expert at a time. Its layout has the weights widened."""
    logits = linear_row(x, experts.router)
    chosen, weights = choose(logits, experts.active, renormalise=experts.renormalise)
    rows = torch.arange(experts.active, dtype=torch.int64, device="cpu")[None]
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    for t, ids in enumerate(chosen.tolist()):
        results = []
        for e in ids:
            inner = silu_and_mul(linear_row(x[t : t + 1], experts.gate_up.weights[e]))
            results.append(linear_row(inner, experts.down.weights[e]))
        out[t : t + 1] = combine(torch.cat(results), weights[t : t + 1], rows)
    return out
