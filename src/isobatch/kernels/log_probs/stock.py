"""Log-probabilities as torch computes them, and in float64 for reference."""

from __future__ import annotations

import torch

from isobatch.kernels.log_probs.cpu import TopLogProbs


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """torch.log_softmax over the last axis."""
    return torch.log_softmax(logits, -1)


def log_softmax_ref(logits: torch.Tensor) -> torch.Tensor:
    """The same in float64."""
    return torch.log_softmax(logits.double(), -1)


def top_log_probs(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TopLogProbs:
    """The chosen tokens' log-probabilities and ranks, and the top `count` of each row."""
    log_probs = torch.log_softmax(logits, -1)
    mine = log_probs.gather(1, chosen[:, None])
    best, ids = torch.topk(log_probs, count)
    return TopLogProbs(mine[:, 0], (log_probs > mine).sum(1) + 1, ids, best)
