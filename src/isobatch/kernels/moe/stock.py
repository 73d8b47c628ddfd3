"""Mixture of experts as torch runs it, with its own grouped product, and in float64 for reference."""

from __future__ import annotations

from typing import Any

import torch


def moe(x: torch.Tensor, experts: Any) -> torch.Tensor:
    """Router, top-k, sort, torch's grouped products, index_add: as models on torch do it."""
    logits = torch.nn.functional.linear(x, experts.router)
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, experts.active, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    token = order // experts.active
    counts = torch.zeros(len(experts.router), dtype=torch.int64, device=x.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).to(torch.int32)
    halves = torch._grouped_mm(x[token], experts.gate_up.transpose(1, 2), offs=ends)
    gate, up = halves.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    y = torch._grouped_mm(inner, experts.down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, token, y * weights.flatten()[order, None])


def moe_ref(x: torch.Tensor, experts: Any) -> torch.Tensor:
    """The same in float64, an expert at a time."""
    x64 = x.double()
    linear = torch.nn.functional.linear
    logits = linear(x64, experts.router.double())
    chosen = torch.argsort(logits, dim=-1, descending=True, stable=True)[:, : experts.active]
    weights = torch.softmax(logits.gather(1, chosen), -1)
    out = torch.zeros_like(x64)
    for expert in range(len(experts.router)):
        token, slot = torch.where(chosen == expert)
        halves = linear(x64[token], experts.gate_up[expert].double())
        gate, up = halves.chunk(2, -1)
        y = linear(torch.nn.functional.silu(gate) * up, experts.down[expert].double())
        out.index_add_(0, token, y * weights[token, slot, None])
    return out
