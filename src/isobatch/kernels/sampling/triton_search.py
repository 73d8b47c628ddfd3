"""Where top_k and top_p cut: a search over the bit pattern of z, by exact integer sums.

z is never positive, so the pattern of -z ascends as z descends, and a key is that pattern. Both filters keep
what has less than a target before it, by (key, id): top_k with a mass of 1 each, top_p with their weights.
A tile of candidates stays in registers; what is beyond it is read again for every bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isobatch.kernels.sampling.triton_noise import NOWHERE, mass, scaled, weight

STATES = 12
"""Numbers kept of a row: (digits, what weighs before them, the target) after each of four levels."""


@triton.jit
def reach(top_p, total):
    """The least integer weight that is top_p of the total: what has less before it is kept."""
    return tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def coarse(z):
    """floor(-128 z), at most 4095: twelve bits that ascend as z descends. Beyond, no token weighs 2^-44."""
    return tl.minimum(z * -128.0, 4095.0).to(tl.int32)


@triton.jit
def narrowed(states, masses, top_p, span, SPANS: tl.constexpr, PAD: tl.constexpr, LEVEL: tl.constexpr):
    """(the leading LEVEL digits of `coarse` where the prefix ends, what weighs before them, the target).

    From the same of the level before and from what its digits weigh in each span. The first span's program
    writes it down for the next level.
    """
    digits = tl.full((), 0, tl.int32)
    base = tl.full((), 0, tl.int64)
    target = tl.full((), 0, tl.int64)
    if LEVEL > 0:
        s, j = tl.arange(0, PAD), tl.arange(0, 16)
        at = masses + ((LEVEL - 1) * SPANS + s[:, None]) * 16 + j[None, :]
        by_digit = tl.sum(tl.load(at, mask=(s < SPANS)[:, None] & (j >= 0)[None, :], other=0), 0)
        if LEVEL == 1:
            target = reach(top_p, tl.sum(by_digit, 0))
        else:
            digits = tl.load(states + (LEVEL - 1) * 3).to(tl.int32)
            base = tl.load(states + (LEVEL - 1) * 3 + 1)
            target = tl.load(states + (LEVEL - 1) * 3 + 2)
        digit = tl.sum((base + tl.cumsum(by_digit, 0) < target).to(tl.int32), 0)
        base += tl.sum(tl.where(j < digit, by_digit, 0), 0)
        digits = digits * 16 + tl.minimum(digit, 15)
    if span == 0:
        tl.store(states + LEVEL * 3, digits.to(tl.int64))
        tl.store(states + LEVEL * 3 + 1, base)
        tl.store(states + LEVEL * 3 + 2, target)
    return digits, base, target


@triton.jit
def tile(start, n, listed, list_ids, x_row, largest, heat, min_p, out, last, WIDTH: tl.constexpr):
    """Candidates start .. start + WIDTH - 1 of n: ids, z, weights, and keys, which are NOWHERE if not kept.

    They are the listed ones, or all tokens. Kept is what min_p keeps and what comes before (out, last), that
    included, by (key, id).
    """
    i = start + tl.arange(0, WIDTH)
    ids = tl.where(listed, tl.load(list_ids + i, mask=i < tl.where(listed, n, 0), other=0), i)
    x = tl.load(x_row + ids, mask=i < n, other=0.0)
    z = scaled(x, largest, heat)
    w = weight(z)
    key = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    before = (key < out) | ((key == out) & (ids <= last))
    return ids, z, w, tl.where((i < n) & (w >= min_p) & before, key, NOWHERE)


@triton.jit
def mass_below(
    trial,
    id_trial,
    ids,
    w,
    key,
    n,
    listed,
    list_ids,
    x_row,
    largest,
    heat,
    min_p,
    out,
    last,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of all n candidates, of which the first tile is given.

    How many keys are below the trial (KIND 0), how much they weigh (1), how many equal it with lower ids (2).
    """
    if KIND == 0:
        found = tl.sum((key < trial).to(tl.int64), 0)
    elif KIND == 1:
        found = tl.sum(tl.where(key < trial, mass(w), 0), 0)
    else:
        found = tl.sum(((key == trial) & (ids < id_trial)).to(tl.int64), 0)
    for start in range(WIDTH, n, WIDTH):
        ids_, _z, w_, key_ = tile(start, n, listed, list_ids, x_row, largest, heat, min_p, out, last, WIDTH)
        if KIND == 0:
            found += tl.sum((key_ < trial).to(tl.int64), 0)
        elif KIND == 1:
            found += tl.sum(tl.where(key_ < trial, mass(w_), 0), 0)
        else:
            found += tl.sum(((key_ == trial) & (ids_ < id_trial)).to(tl.int64), 0)
    return found


@triton.jit
def prefix(
    target,
    ids,
    w,
    key,
    n,
    listed,
    list_ids,
    x_row,
    largest,
    heat,
    min_p,
    out,
    last,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The last candidate, as (key, id), before which there is less than the target.

    Its key is the largest below which there is less. Equal keys have equal masses, so a division says how
    many of them are left in, and those are the ones of lowest id.
    """
    KIND: tl.constexpr = 1 if WEIGHTED else 0
    cut = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << 31, tl.int64)
    for _ in range(31):
        step = step >> 1
        trial = cut + step.to(tl.int32)
        below = mass_below(
            trial, 0, ids, w, key, n, listed, list_ids, x_row, largest, heat, min_p, out, last, KIND, WIDTH
        )
        cut = tl.where(below < target, trial, cut)
    below = mass_below(
        cut, 0, ids, w, key, n, listed, list_ids, x_row, largest, heat, min_p, out, last, KIND, WIDTH
    )
    ties = mass_below(
        cut, NOWHERE, ids, w, key, n, listed, list_ids, x_row, largest, heat, min_p, out, last, 2, WIDTH
    )
    each = tl.full((), 1, tl.int64)
    if WEIGHTED:
        each = tl.maximum(mass(weight(-(cut.to(tl.float32, bitcast=True)))), 1)
    left = (target - below + each - 1) // each
    last_id = tl.full((), NOWHERE, tl.int32)
    if (left < ties) & (cut < NOWHERE):
        last_id = tl.full((), 0, tl.int32)
        step = tl.full((), 1 << 18, tl.int64)
        for _ in range(18):
            step = step >> 1
            trial = last_id + step.to(tl.int32)
            lower = mass_below(
                cut, trial, ids, w, key, n, listed, list_ids, x_row, largest, heat, min_p, out, last, 2, WIDTH
            )
            last_id = tl.where(lower < left, trial, last_id)
    # What an earlier filter cut off stays off.
    last_id = tl.where(cut >= out, tl.minimum(last_id, last), last_id)
    cut = tl.minimum(cut, out)
    # A target of zero keeps nothing, not even the first.
    nothing = target <= 0
    return tl.where(nothing, 0, cut), tl.where(nothing, -1, last_id)
