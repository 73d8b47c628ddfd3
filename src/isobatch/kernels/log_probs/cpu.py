"""Log-probabilities on the CPU: float32 logits, float64 sums, float32 results.

Written order, for a row of logits x: m = max x; w_i = exp2((x_i - m) * log2(e)) in float32; sixteen float64
lanes, lane t adding the w_i with i mod 16 == t, ascending, folded in halves; z = m + log(sum) in float64;
log p_i = float32(x_i - z). Ranks and top entries order by (logit descending, token id ascending).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import prange

from isobatch.kernels.cpu.elementary import LOG2_E, exp2, log
from isobatch.kernels.cpu.jit import array, device, empty, kernel

LANES = 16


@device
def log_sum_exp(x):
    """log(sum(exp(x))) of a float32 row, in float64."""
    m = x[0]
    for i in range(1, x.shape[0]):
        m = x[i] if x[i] > m else m
    lanes = np.zeros(LANES, np.float64)
    whole = x.shape[0] - x.shape[0] % LANES
    for i in range(0, whole, LANES):
        for t in range(LANES):
            lanes[t] = lanes[t] + np.float64(exp2((x[i + t] - m) * LOG2_E))
    for t in range(x.shape[0] - whole):
        lanes[t] = lanes[t] + np.float64(exp2((x[whole + t] - m) * LOG2_E))
    width = LANES // 2
    while width:
        for t in range(width):
            lanes[t] = lanes[t] + lanes[t + width]
        width //= 2
    return np.float64(m) + log(lanes[0])


@kernel
def _log_softmax(logits, out):
    for r in prange(logits.shape[0]):
        z = log_sum_exp(logits[r])
        for i in range(logits.shape[1]):
            out[r, i] = np.float32(np.float64(logits[r, i]) - z)


@kernel
def _top_log_probs(logits, chosen, chosen_log_prob, chosen_rank, top_ids, top_log_probs):
    count = top_ids.shape[1]
    for r in prange(logits.shape[0]):
        x = logits[r]
        z = log_sum_exp(x)
        mine = x[chosen[r]]
        chosen_log_prob[r] = np.float32(np.float64(mine) - z)
        rank = 1
        for i in range(x.shape[0]):
            rank += x[i] > mine or (x[i] == mine and i < chosen[r])
        chosen_rank[r] = rank
        held = 0
        for i in range(x.shape[0]):
            if count and (held < count or x[i] > x[top_ids[r, held - 1]]):
                at = held if held < count else count - 1
                while at > 0 and x[i] > x[top_ids[r, at - 1]]:
                    top_ids[r, at] = top_ids[r, at - 1]
                    at -= 1
                top_ids[r, at] = i
                held = min(held + 1, count)
        for j in range(held):
            top_log_probs[r, j] = np.float32(np.float64(x[top_ids[r, j]]) - z)


@dataclass(frozen=True, slots=True)
class TopLogProbs:
    """Log-probabilities of R rows.

    Args:
        chosen: float32 [R], of the chosen token.
        rank: int64 [R], of the chosen token, 1 for the likeliest.
        ids: int64 [R, count], the likeliest tokens, best first.
        log_probs: float32 [R, count], theirs.
    """

    chosen: torch.Tensor
    rank: torch.Tensor
    ids: torch.Tensor
    log_probs: torch.Tensor


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """log softmax of each row."""
    out, out_array = empty(*logits.shape)
    _log_softmax(array(logits), out_array)
    return out


def top_log_probs(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TopLogProbs:
    """The chosen tokens' log-probabilities and ranks, and the top `count` of each row."""
    rows = len(logits)
    result = TopLogProbs(
        empty(rows)[0],
        torch.empty(rows, dtype=torch.int64, device="cpu"),
        torch.empty(rows, count, dtype=torch.int64, device="cpu"),
        empty(rows, count)[0],
    )
    _top_log_probs(
        array(logits),
        array(chosen),
        result.chosen.numpy(),
        result.rank.numpy(),
        result.ids.numpy(),
        result.log_probs.numpy(),
    )
    return result
