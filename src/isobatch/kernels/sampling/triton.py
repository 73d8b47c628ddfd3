"""Sampling on the GPU: the CPU's rule (see `kernels/sampling/cpu.py`), for every batch size alike.

Written order: scores, weights and the scaled logits z are the CPU's to the bit. What is summed is summed in
integers, exactly, so that no order is left to fix: counts for top_k, and for top_p floor(w * 2^44), where the
CPU adds the weights w in float64. The prefix of top_p is what has less than ceil(top_p * total) before it,
top_p and total in float64. The two can part only where a running sum comes within 2^-26 of that bound.

Nothing is sorted. The launches, whose grids know S and V alone:
  scan    (row, span)  the span's largest logit and its first id, and the largest of every 64 tokens
  bound   (row)        the row's largest; the k-th largest of those maxima: k tokens at least are as large
  weigh   (row, span)  with top_p alone, three times: what the tokens weigh by a digit of floor(-128 z), so
                       that 12 bits of it say where the prefix ends
  gather  (row, span)  which tokens the end can be among
  cut     (row)        the end, as (key, id), bit by bit over z's pattern
  noise   (row, span)  the span's noisiest token of what is kept
  choose  (row)        the row's
A row that has more candidates than `gather` lists is searched whole: slower, by the same rule. The list's
order is a race, and nothing depends on it: counts and maxima with ties by id do not know their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.elementary import LOWEST, UNFUSED, from_ordered, ordered
from isobatch.kernels.sampling.cpu import SamplingRows
from isobatch.kernels.sampling.triton_noise import NOWHERE, mass, noisiest, scaled, weight, words_of_span
from isobatch.kernels.sampling.triton_search import STATES, coarse, mass_below, narrowed, prefix, reach, tile

_SUB, _STATES = tl.constexpr(64), tl.constexpr(STATES)
# More than two tokens whose weights are rounded the wrong way round can be apart.
_SLACK = tl.constexpr(0.001)


@triton.jit
def _scan_kernel(logits, sub_keys, span_keys, span_ids, stride, V: tl.constexpr, WIDTH: tl.constexpr):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    SUBS: tl.constexpr = WIDTH // _SUB
    sub = span * SUBS + tl.arange(0, SUBS)
    ids = sub[:, None] * _SUB + tl.arange(0, _SUB)[None, :]
    x = tl.load(logits + row * stride + ids, mask=ids < V, other=0.0)
    key = tl.where(ids < V, ordered(x), LOWEST)
    largest = tl.max(key, 1)
    ALL: tl.constexpr = (V + _SUB - 1) // _SUB
    tl.store(sub_keys + row * ALL + sub, largest, mask=sub < ALL)
    top = tl.max(largest, 0)
    first = tl.min(tl.min(tl.where(key == top, ids, NOWHERE), 1), 0)
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    wild = tl.max(tl.max((bits == 0x7F800000).to(tl.int32), 1), 0)
    at = row * tl.num_programs(1) + span
    tl.store(span_keys + at, top)
    tl.store(span_ids + at, tl.where(wild > 0, -1, first))


@triton.jit
def _bound_kernel(
    sub_keys,
    span_keys,
    span_ids,
    temperature,
    top_k,
    largest,
    best,
    bound,
    listed,
    SPANS: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPANS_PAD)
    keys = tl.load(span_keys + row * SPANS + s, mask=s < SPANS, other=LOWEST)
    ids = tl.load(span_ids + row * SPANS + s, mask=s < SPANS, other=NOWHERE)
    top = tl.max(keys, 0)
    first = tl.min(tl.where(keys == top, ids, NOWHERE), 0)
    first = tl.where(tl.min(ids, 0) < 0, -1, first)
    m = from_ordered(top)
    tl.store(largest + row, m)
    tl.store(best + row, first)
    tl.store(listed + row, 0)
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    if (heat > 0.0) & (k > 0) & (first >= 0):
        j = tl.arange(0, SUBS_PAD)
        subs = tl.load(sub_keys + row * SUBS + j, mask=j < SUBS, other=LOWEST).to(tl.int64)
        least = tl.full((), LOWEST, tl.int64)
        step = tl.full((), 1 << 32, tl.int64)
        for _ in range(32):
            step = step >> 1
            above = tl.sum((subs >= least + step).to(tl.int32), 0)
            least = tl.where(above >= k, least + step, least)
        z = scaled(from_ordered(least.to(tl.int32)), m, heat) - _SLACK
        tl.store(bound + row, tl.where(least == LOWEST, float("-inf"), z))


@triton.jit
def _weigh_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    largest,
    best,
    states,
    masses,
    stride,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    SPANS: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    LEVEL: tl.constexpr,
):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat, p = tl.load(temperature + row), tl.load(top_p + row)
    alone = (tl.load(top_k + row) <= 0) & (p < 1.0)
    if (heat > 0.0) & alone & (tl.load(best + row) >= 0):
        states_row, masses_row = states + row * _STATES, masses + row * (3 * SPANS * 16)
        digits, _base, _target = narrowed(states_row, masses_row, p, span, SPANS, SPANS_PAD, LEVEL)
        ids = span * WIDTH + tl.arange(0, WIDTH)
        x = tl.load(logits + row * stride + ids, mask=ids < V, other=0.0)
        z = scaled(x, tl.load(largest + row), heat)
        w = weight(z)
        bin_ = coarse(z)
        kept = (ids < V) & (w >= tl.load(min_p + row)) & ((bin_ >> (12 - 4 * LEVEL)) == digits)
        digit = tl.where(kept, (bin_ >> (8 - 4 * LEVEL)) & 15, 16)
        out = masses_row + (LEVEL * SPANS + span) * 16
        if tl.max(kept.to(tl.int32), 0) > 0:
            m = mass(w)
            for j in tl.static_range(16):
                tl.store(out + j, tl.sum(tl.where(digit == j, m, 0), 0))
        else:
            tl.store(out + tl.arange(0, 16), tl.zeros((16,), tl.int64))


@triton.jit
def _gather_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    largest,
    best,
    bound,
    states,
    masses,
    listed,
    list_ids,
    stride,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    SPANS: tl.constexpr,
    SPANS_PAD: tl.constexpr,
    ROOM: tl.constexpr,
):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    if (heat > 0.0) & (tl.load(best + row) >= 0) & ((k > 0) | (p < 1.0)):
        ids = span * WIDTH + tl.arange(0, WIDTH)
        x = tl.load(logits + row * stride + ids, mask=ids < V, other=0.0)
        z = scaled(x, tl.load(largest + row), heat)
        kept = (ids < V) & (weight(z) >= tl.load(min_p + row))
        if k > 0:
            kept = kept & (z >= tl.load(bound + row))
        else:
            states_row, masses_row = states + row * _STATES, masses + row * (3 * SPANS * 16)
            digits, _base, _target = narrowed(states_row, masses_row, p, span, SPANS, SPANS_PAD, 3)
            kept = kept & (coarse(z) == digits)
        ones = kept.to(tl.int32)
        count = tl.sum(ones, 0)
        if count > 0:
            at = tl.atomic_add(listed + row, count) + tl.cumsum(ones, 0) - 1
            tl.store(list_ids + row * ROOM + at, ids, mask=kept & (at < ROOM))


@triton.jit
def _cut_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    largest,
    best,
    states,
    listed,
    list_ids,
    cuts,
    stride,
    V: tl.constexpr,
    ROOM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    if (heat > 0.0) & (tl.load(best + row) >= 0) & ((k > 0) | (p < 1.0)):
        m, least = tl.load(largest + row), tl.load(min_p + row)
        x_row, ids_row = logits + row * stride, list_ids + row * ROOM
        count = tl.load(listed + row)
        fits = count <= ROOM
        n = tl.where(fits, count, V)
        out, last = tl.full((), NOWHERE, tl.int32), tl.full((), NOWHERE, tl.int32)
        ids, _z, w, key = tile(0, n, fits, ids_row, x_row, m, heat, least, out, last, ROOM)
        if k > 0:
            out, last = prefix(
                k, ids, w, key, n, fits, ids_row, x_row, m, heat, least, out, last, False, ROOM
            )
            ids, _z, w, key = tile(0, n, fits, ids_row, x_row, m, heat, least, out, last, ROOM)
        if p < 1.0:
            if k > 0:
                total = mass_below(
                    NOWHERE, 0, ids, w, key, n, fits, ids_row, x_row, m, heat, least, out, last, 1, ROOM
                )
                target = reach(p, total)
            else:
                # What lies before the listed ones is known to be kept, and what it weighs.
                base = tl.load(states + row * _STATES + 10)
                target = tl.load(states + row * _STATES + 11) - tl.where(fits, base, 0)
            out, last = prefix(
                target, ids, w, key, n, fits, ids_row, x_row, m, heat, least, out, last, True, ROOM
            )
        tl.store(cuts + row * 2, out)
        tl.store(cuts + row * 2 + 1, last)


@triton.jit
def _noise_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    largest,
    best,
    cuts,
    span_scores,
    span_ids,
    stride,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    if (heat > 0.0) & (tl.load(best + row) >= 0):
        m, x_row = tl.load(largest + row), logits + row * stride
        ids = span * WIDTH + tl.arange(0, WIDTH)
        z = scaled(tl.load(x_row + ids, mask=ids < V, other=0.0), m, heat)
        kept = ids < V
        if tl.load(min_p + row) > 0.0:
            kept = kept & (weight(z) >= tl.load(min_p + row))
        if (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0):
            key = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            out, last = tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1)
            kept = kept & ((key < out) | ((key == out) & (ids <= last)))
        score, token = tl.full((), float("-inf"), tl.float64), tl.full((), NOWHERE, tl.int32)
        if tl.max(kept.to(tl.int32), 0) > 0:
            s, n = tl.load(seed + row), tl.load(position + row)
            word = words_of_span(s, n, span * WIDTH, WIDTH)
            score, token = noisiest(z, kept, word, ids, s, n, x_row, m, heat, score, token)
        at = row * tl.num_programs(1) + span
        tl.store(span_scores + at, score)
        tl.store(span_ids + at, token)


@triton.jit
def _choose_kernel(
    temperature, best, span_scores, span_ids, tokens, SPANS: tl.constexpr, SPANS_PAD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(best + row)
    if (tl.load(temperature + row) > 0.0) & (token >= 0):
        s = tl.arange(0, SPANS_PAD)
        scores = tl.load(span_scores + row * SPANS + s, mask=s < SPANS, other=float("-inf"))
        ids = tl.load(span_ids + row * SPANS + s, mask=s < SPANS, other=NOWHERE)
        token = tl.min(tl.where(scores == tl.max(scores, 0), ids, NOWHERE), 0)
        token = tl.where(token == NOWHERE, -1, token)
    tl.store(tokens + row, token.to(tl.int64))


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work is cut.

    Args:
        width: tokens of a span, a power of two from 64.
        warps: of a program over a span.
        room: how many candidates of a row are listed, a power of two.
    """

    width: int
    warps: int
    room: int


def sample_cut(logits: torch.Tensor, rows: SamplingRows, *, cut: Cut) -> torch.Tensor:
    """`sample` in given pieces."""
    S, V = logits.shape
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    spans, subs = triton.cdiv(V, cut.width), triton.cdiv(V, _SUB.value)
    new = x.new_empty
    tokens = new((S,), dtype=torch.int64)
    if not S:
        return tokens
    sub_keys, span_keys, span_ids = (new((S, n), dtype=torch.int32) for n in (subs, spans, spans))
    largest, bound = new((S,)), new((S,))
    best, listed = new((S,), dtype=torch.int32), new((S,), dtype=torch.int32)
    heat, top_k, top_p, min_p, seed, position = (
        column.contiguous()
        for column in (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position)
    )
    parameters = (heat, top_k, top_p, min_p)
    stride = x.stride(0)
    wide, whole = {"num_warps": cut.warps, **UNFUSED}, {"num_warps": 8, **UNFUSED}
    size = {"V": V, "WIDTH": cut.width}
    padded = {"SPANS": spans, "SPANS_PAD": triton.next_power_of_2(spans)}
    grid = (S, spans)
    _scan_kernel[grid](x, sub_keys, span_keys, span_ids, stride, **size, **wide)
    found = (sub_keys, span_keys, span_ids, heat, top_k, largest, best, bound, listed)
    _bound_kernel[(S,)](*found, SUBS=subs, SUBS_PAD=triton.next_power_of_2(subs), **padded, **whole)
    cuts = new((S, 2), dtype=torch.int32)
    if not rows.greedy and not rows.unfiltered:
        states = new((S, _STATES.value), dtype=torch.int64)
        masses = new((S, 3, spans, 16), dtype=torch.int64)
        list_ids = new((S, cut.room), dtype=torch.int32)
        row = (*parameters, largest, best)
        for level in range(3):
            _weigh_kernel[grid](x, *row, states, masses, stride, LEVEL=level, **size, **padded, **wide)
        _gather_kernel[grid](
            x, *row, bound, states, masses, listed, list_ids, stride, ROOM=cut.room, **size, **padded, **wide
        )
        _cut_kernel[(S,)](x, *row, states, listed, list_ids, cuts, stride, V=V, ROOM=cut.room, **whole)
    if not rows.greedy:
        scores = new((S, spans), dtype=torch.float64)
        drawn = (*parameters, seed, position, largest, best, cuts)
        _noise_kernel[grid](x, *drawn, scores, span_ids, stride, **size, **wide)
    else:
        scores = largest
    _choose_kernel[(S,)](heat, best, scores, span_ids, tokens, num_warps=1, **padded)
    return tokens


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """One token id per row.

    Args:
        logits: float32 [S, V], rows at any stride, V at most 2^18.
        rows: each row's parameters, on the same device.

    Returns:
        int64 [S]; -1 where a row of logits holds NaN or infinity.

    Determinism:
        Row s depends on logits[s] and its parameters, seed and position alone. The random words, the weights
        and the scores are the CPU's.
    """
    cut = Cut(2048, 4, 2048)
    return sample_cut(logits, rows, cut=cut)
