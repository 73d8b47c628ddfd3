"""Sampling as servers do it with torch: softmax, sort, cumulative sum, exponential noise.

Source of the noise trick: argmax(p / Exp(1)) is a sample from p, as vLLM uses it.
"""

from __future__ import annotations

import torch

from isobatch.kernels.sampling.cpu import REFUSED, PenaltyRows, SamplingRows, exponential_noise


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """One token id per row; REFUSED where the logits are not finite."""
    greedy = logits.argmax(-1)
    refused = ~torch.isfinite(logits).all(-1)
    if bool((rows.temperature == 0).all()):
        return torch.where(refused, REFUSED, greedy)
    warm = torch.where(rows.temperature == 0, 1, rows.temperature)[:, None]
    probabilities = torch.softmax(logits / warm, -1)
    probabilities[probabilities < rows.min_p[:, None] * probabilities.amax(-1, keepdim=True)] = 0
    if bool((rows.top_k > 0).any()) or bool((rows.top_p < 1).any()):  # servers sort only where they must
        ordered, ids = probabilities.sort(-1, descending=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        ordered[(rank >= rows.top_k[:, None]) & (rows.top_k[:, None] > 0)] = 0
        before = ordered.cumsum(-1) - ordered
        ordered[before > rows.top_p[:, None] * ordered.sum(-1, keepdim=True)] = 0
        probabilities = torch.zeros_like(ordered).scatter_(1, ids, ordered)
    # The noise is ours, not torch's, so that both sides draw the same token where their logits are the same.
    noise = exponential_noise(rows.seed.cpu(), rows.position.cpu(), logits.shape[1]).to(logits.device)
    drawn = (probabilities / noise).argmax(-1)
    return torch.where(refused, REFUSED, torch.where(rows.temperature == 0, greedy, drawn))


def penalize(logits: torch.Tensor, rows: PenaltyRows) -> torch.Tensor:
    """The logits with the penalties applied."""
    out = logits.clone()
    used = rows.ids >= 0
    row, _ = used.nonzero(as_tuple=True)
    ids, counts = rows.ids[used], rows.counts[used]
    x = logits[row, ids]
    x = torch.where(x > 0, x / rows.repetition[row], x * rows.repetition[row])
    out[row, ids] = x - rows.frequency[row] * counts - rows.presence[row] * (counts > 0)
    return out
