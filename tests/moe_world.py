"""A tiny mixture of experts to try relations on, and planted faults such as servers have had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from isobatch.kernels.activation.cpu import silu_and_mul
from isobatch.kernels.linear.cpu import linear_tiles
from isobatch.kernels.moe.cpu import CpuExperts, choose, combine, moe_by_expert
from isobatch.models.config import MoeConfig
from isobatch.models.loading import load_decoder
from isobatch.ops import Ops, certified_ops, stock_ops
from tests.engine_harness import TINY, TinyCheckpoint, World, planted

# Widths that the GPU's grouped products take; a number of experts that no power of two is; three for a token,
# because a sum of two from zero has no order. The second layer is dense.
TINY_MOE = replace(
    TINY,
    architecture="qwen3_moe",
    hidden_size=128,
    moe=MoeConfig(experts=6, active=3, inner=128, renormalise=True, dense_layers=frozenset({1})),
)


def _results(x: torch.Tensor, experts: CpuExperts, chosen: torch.Tensor) -> torch.Tensor:
    """What each slot's expert makes of its token: [T A, K]."""
    out = torch.empty(chosen.numel(), x.shape[1])
    for e in sorted(set(chosen.flatten().tolist())):
        token, slot = torch.where(chosen == e)
        inner = silu_and_mul(linear_tiles(x[token], experts.gate_up.weights[e]))
        out[token * experts.active + slot] = linear_tiles(inner, experts.down.weights[e])
    return out


def combined_by_arrival(x: torch.Tensor, experts: CpuExperts) -> torch.Tensor:
    """Experts with few tokens are done first, and what is done first is added first."""
    logits = linear_tiles(x, experts.router)
    chosen, weights = choose(logits, experts.active, renormalise=experts.renormalise)
    work = chosen.flatten().bincount(minlength=logits.shape[1])
    order = (work[chosen] * logits.shape[1] + chosen).argsort(1)
    rows = torch.arange(chosen.numel()).view(chosen.shape).gather(1, order)
    return combine(_results(x, experts, chosen), weights.gather(1, order), rows)


def short_of_capacity(x: torch.Tensor, experts: CpuExperts) -> torch.Tensor:
    """An expert takes 20 tokens at most; the others do without it."""
    chosen, weights = choose(linear_tiles(x, experts.router), experts.active, renormalise=True)
    for e in sorted(set(chosen.flatten().tolist())):
        token, slot = (found[20:] for found in torch.where(chosen == e))
        weights[token, slot] = 0
    rows = torch.arange(chosen.numel()).view(chosen.shape)
    return combine(_results(x, experts, chosen), weights, rows)


def split_by_load(x: torch.Tensor, experts: CpuExperts) -> torch.Tensor:
    """The second product's sums are split where there are many tokens."""
    if len(x) < 8:
        return moe_by_expert(x, experts)
    halves = []
    for part in (0, 1):
        stack = type(experts.down)(
            tuple(replace(down, codes=down.codes.copy()) for down in experts.down.weights)
        )
        for down in stack.weights:
            half = down.inputs // 2
            down.codes[:, half * part : half * (part + 1)] = 0
        halves.append(moe_by_expert(x, replace(experts, down=stack)))
    return halves[0] + halves[1]


MOE_FAULTS: dict[str, Callable[..., Any]] = {
    fault.__name__: fault for fault in (combined_by_arrival, short_of_capacity, split_by_load)
}


@cache
def moe_world(fault: str = "none", *, poisoned: bool = False) -> World:
    """A world over TINY_MOE.

    Args:
        fault: a key of MOE_FAULTS, "stock" or "none".
        poisoned: whether the embedding of POISON is NaN.
    """
    if fault in MOE_FAULTS:
        ops: Ops = planted(moe=MOE_FAULTS[fault])
    else:
        ops = stock_ops() if fault == "stock" else certified_ops()
    decoder = load_decoder(TinyCheckpoint(poisoned=poisoned, config=TINY_MOE), ops)
    return World(decoder, fill=None if fault == "stock" else float("nan"))
