"""Sampling as servers do it with torch: softmax, sort, cumulative sum, exponential noise.

Source of the noise trick: argmax(p / Exp(1)) is a sample from p, as vLLM uses it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from isobatch.kernels.sampling.cpu import REFUSED, PenaltyRows, SamplingRows, exponential_noise

Noise = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From seeds, positions and a vocabulary to exponential noise, float32 [R, V]."""


def sample(logits: torch.Tensor, rows: SamplingRows, noise: Noise = exponential_noise) -> torch.Tensor:
    """One token id per row; REFUSED where the logits are not finite. Waits for no result on a GPU."""
    best, greedy = logits.max(-1)
    refused = ~(torch.isfinite(best) & torch.isfinite(logits.amin(-1)))
    if rows.greedy:
        return torch.where(refused, REFUSED, greedy)
    warm = torch.where(rows.temperature == 0, 1, rows.temperature)[:, None]
    probabilities = torch.softmax(logits / warm, -1)
    probabilities[probabilities < rows.min_p[:, None] * probabilities.amax(-1, keepdim=True)] = 0
    if not rows.unfiltered:  # servers sort only where they must
        ordered, ids = probabilities.sort(-1, descending=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        ordered[(rank >= rows.top_k[:, None]) & (rows.top_k[:, None] > 0)] = 0
        before = ordered.cumsum(-1) - ordered
        ordered[before > rows.top_p[:, None] * ordered.sum(-1, keepdim=True)] = 0
        probabilities = torch.zeros_like(ordered).scatter_(1, ids, ordered)
    # The noise is ours, not torch's, so that both sides draw the same token where their logits are the same.
    drawn = (probabilities / noise(rows.seed, rows.position, logits.shape[1])).argmax(-1)
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
