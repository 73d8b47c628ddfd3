"""Sampling on the CPU. A token is a function of its row of logits, the parameters, the seed and the position.

Written order, for a row x:
1. Penalties, for each token seen: x = x / repetition if x > 0 else x * repetition; x = x - frequency * count;
   x = x - presence if count > 0. Repetition looks at prompt and output, count at the output.
2. Temperature 0: the largest x, the lowest id among equals. Else z = (x - max x) / temperature, and
   w = exp2(z * log2(e)), so the likeliest token weighs 1.
3. min_p keeps w >= min_p. top_k keeps the k first by (z descending, id ascending). top_p sums the kept w in
   float64 by ascending id, and keeps the shortest prefix, by (z descending, id ascending), whose running
   float64 sum reaches top_p of that total. Weights below (1 - top_p) * total / (2 V) cannot be in it and are
   passed over.
4. Gumbel-max over what is kept: the largest z + g, the lowest id among equals, with g = -log(-log(1 - u)) in
   float64 and u = (Philox word of (seed, position, id) + 1/2) / 2^32. Source: Gumbel 1954. An argmax needs no
   sum, so there is no order to fix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import prange

from isobatch.kernels.cpu.elementary import LOG2_E, exp2, log
from isobatch.kernels.cpu.jit import array, device, empty, kernel
from isobatch.kernels.sampling.philox import noise_words

# More than the rounding of exp2 and of its argument can take away from a bound.
_SLACK = np.float32(1.01)
REFUSED = -1
"""Stands for a token where the logits hold NaN or infinity."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows.

    Args:
        temperature: float32 [R], 0 for greedy.
        top_k: int64 [R], 0 for off.
        top_p: float32 [R], 1 for off.
        min_p: float32 [R], 0 for off.
        seed: int64 [R], the 64 bits of an unsigned seed.
        position: int64 [R], the position in the sequence that the sampled token will take.
        greedy: whether every temperature is known to be 0, which spares the GPU launches that would find
            nothing to do, and changes no token.
        unfiltered: likewise, whether no row is known to have top_k or top_p.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    greedy: bool = False
    unfiltered: bool = False


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """Tokens that each of R rows has seen, with the row's penalties.

    Args:
        ids: int64 [R, E], distinct within a row, padded with -1.
        counts: int64 [R, E], occurrences in the output; 0 for tokens of the prompt alone.
        repetition: float32 [R], 1 for off.
        presence: float32 [R], 0 for off.
        frequency: float32 [R], 0 for off.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@device
def _uniform(word):
    return (np.float64(word) + 0.5) * 2.0**-32


@device
def _gumbel(u):
    return -log(-log(1.0 - u))


@device
def _argmax_of_noisy(z, keep, seed, position):
    """The largest z + g among the kept, the lowest id among equals.

    A token passes the best score so far only if -log(1 - u) < e^(z - score), and u is less than that: so most
    are passed over with their random bits alone, and no logarithm.
    """
    best, score = -1, -np.inf
    for group in range((len(z) + 3) // 4):
        words = noise_words(seed, position, group)
        for lane in range(4):
            i = 4 * group + lane
            if i < len(z) and keep[i]:
                u = _uniform(words[lane])
                behind = np.float32(np.float64(z[i]) - score)
                if u < _SLACK * exp2(behind * LOG2_E):
                    other = np.float64(z[i]) + _gumbel(u)
                    if other > score:
                        best, score = i, other
    return best


@device
def _keep_top_k(z, keep, k):
    """Of the kept, keeps the k first by (z descending, id ascending)."""
    kept = np.flatnonzero(keep)
    if len(kept) <= k:
        return
    kth = np.partition(z[kept], len(kept) - k)[len(kept) - k]
    above = 0
    for i in kept:
        above += z[i] > kth
    for i in kept:
        if z[i] == kth and above < k:
            above += 1
        elif z[i] <= kth:
            keep[i] = False


@device
def _keep_top_p(z, weight, keep, top_p):
    """Of the kept, keeps the shortest prefix that reaches top_p of their weight."""
    total = 0.0
    for i in range(len(z)):
        if keep[i]:
            total += np.float64(weight[i])
    least = (1.0 - top_p) * total / (2 * len(z))
    for i in range(len(z)):
        keep[i] = keep[i] and weight[i] >= least
    kept = np.flatnonzero(keep)
    running = 0.0
    for i in kept[np.argsort(-z[kept], kind="mergesort")]:
        keep[i] = running < top_p * total
        running += np.float64(weight[i])


@device
def _sample_row(x, temperature, top_k, top_p, min_p, seed, position):
    V = x.shape[0]
    best = 0
    finite = True
    for i in range(V):
        finite = finite and np.isfinite(x[i])
        best = i if x[i] > x[best] else best
    if not finite:
        return REFUSED
    if temperature == 0:
        return best
    z = (x - x[best]) / temperature
    keep = np.ones(V, np.bool_)
    if min_p > 0 or top_p < 1:
        weight = np.empty(V, np.float32)
        for i in range(V):
            weight[i] = exp2(z[i] * LOG2_E)
        if min_p > 0:
            for i in range(V):
                keep[i] = weight[i] >= min_p
        if top_k > 0:
            _keep_top_k(z, keep, top_k)
        if top_p < 1:
            _keep_top_p(z, weight, keep, top_p)
    elif top_k > 0:
        _keep_top_k(z, keep, top_k)
    return _argmax_of_noisy(z, keep, seed, position)


@kernel
def _sample(logits, temperature, top_k, top_p, min_p, seed, position, tokens):
    for r in prange(logits.shape[0]):
        tokens[r] = _sample_row(
            logits[r], temperature[r], top_k[r], np.float64(top_p[r]), min_p[r], seed[r], position[r]
        )


@kernel
def _penalize(logits, ids, counts, repetition, presence, frequency, out):
    for r in prange(logits.shape[0]):
        out[r] = logits[r]
        for e in range(ids.shape[1]):
            token = ids[r, e]
            if token < 0:
                break
            x = logits[r, token]
            if repetition[r] != 1:
                x = x / repetition[r] if x > 0 else x * repetition[r]
            x = x - frequency[r] * np.float32(counts[r, e])
            if counts[r, e] > 0:
                x = x - presence[r]
            out[r, token] = x


@kernel
def _fill_exponential(seed, position, out):
    for r in prange(out.shape[0]):
        for i in range(out.shape[1]):
            words = noise_words(seed[r], position[r], i // 4)
            out[r, i] = -log(1.0 - _uniform(words[i % 4]))


def exponential_noise(seed: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The noise behind `sample` for every token, float32 [R, V], for torch's side to draw with the same."""
    out, out_array = empty(len(seed), vocabulary)
    _fill_exponential(array(seed), array(position), out_array)
    return out


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """One token id per row; REFUSED where the logits are not finite."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device="cpu")
    _sample(
        array(logits),
        array(rows.temperature),
        array(rows.top_k),
        array(rows.top_p),
        array(rows.min_p),
        array(rows.seed),
        array(rows.position),
        tokens.numpy(),
    )
    return tokens


def penalize(logits: torch.Tensor, rows: PenaltyRows) -> torch.Tensor:
    """The logits with the penalties applied."""
    out, out_array = empty(*logits.shape)
    _penalize(
        array(logits),
        array(rows.ids),
        array(rows.counts),
        array(rows.repetition),
        array(rows.presence),
        array(rows.frequency),
        out_array,
    )
    return out
