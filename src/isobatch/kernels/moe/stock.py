"""Mixture of experts as torch runs it, by a grouped product or a loop, and in float64 for reference."""

from __future__ import annotations

import torch

from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.stock import DenseStack, DenseWeight

DenseExperts = Experts[DenseWeight, DenseStack]


def _routed(x: torch.Tensor, experts: DenseExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of each token's experts."""
    logits = torch.nn.functional.linear(x, experts.router.dense)
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, experts.active, -1)
    if experts.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(x.dtype), chosen


def moe(x: torch.Tensor, experts: DenseExperts) -> torch.Tensor:
    """Router, top-k, sort, torch's grouped products, index_add: as models on torch do it on a GPU."""
    weights, chosen = _routed(x, experts)
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    token = order // experts.active
    counts = torch.zeros(experts.router.outputs, dtype=torch.int64, device=x.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).to(torch.int32)
    halves = torch._grouped_mm(x[token], experts.gate_up.dense.transpose(1, 2), offs=ends)
    gate, up = halves.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    y = torch._grouped_mm(inner, experts.down.dense.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, token, y * weights.flatten()[order, None])


def moe_by_expert(x: torch.Tensor, experts: DenseExperts) -> torch.Tensor:
    """Router, top-k, and a loop over experts: as models on torch do it on a CPU."""
    return _over_experts(x, experts, *_routed(x, experts))


def moe_ref(x: torch.Tensor, experts: DenseExperts) -> torch.Tensor:
    """The same in float64."""
    x64 = x.double()
    logits = torch.nn.functional.linear(x64, experts.router.dense.double())
    chosen = torch.argsort(logits, dim=-1, descending=True, stable=True)[:, : experts.active]
    weights = torch.softmax(logits, -1).gather(1, chosen)
    if experts.renormalise:  # not by dividing, since all of them may have vanished beside the others
        weights = torch.softmax(logits.gather(1, chosen), -1)
    return _over_experts(x64, experts, weights, chosen)


def _over_experts(
    x: torch.Tensor, experts: DenseExperts, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for expert in range(experts.router.outputs):
        token, slot = torch.where(chosen == expert)
        halves = torch.nn.functional.linear(x[token], experts.gate_up.dense[expert].to(x.dtype))
        gate, up = halves.chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        y = torch.nn.functional.linear(inner, experts.down.dense[expert].to(x.dtype))
        out.index_add_(0, token, y * weights[token, slot, None])
    return out
