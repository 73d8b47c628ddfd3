"""Log-probabilities on the GPU: float32 logits, float64 sums, float32 results. S rows, V vocabulary.

Written order, for a row of logits x, cut into spans of 4,096 tokens: m_i = the span's largest;
w = exp2((x - m_i) * log2(e)) in float32, the CPU's exp2; the span's w are added in float64 by the tree of
`kernels.gpu.rows.fold`, padded with zeros; the spans are joined, m = max m_i, as the sum, by the same tree,
of exp2((m_i - m) * log2(e)) * sum_i in float64; z = m + log(sum) in float64; log p = float32(x - z). The
spans depend on V alone. Ranks and top entries order by (logit descending, token id ascending).

The likeliest `count` tokens lie in the `count` groups of 64 tokens with the largest maxima, by (maximum
descending, group ascending): so the logits are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.errors import UnsupportedOpError
from isobatch.kernels.gpu.elementary import LOG2_E, LOWEST, UNFUSED, exp2, from_ordered, log, ordered
from isobatch.kernels.gpu.rows import fold
from isobatch.kernels.log_probs.cpu import TopLogProbs

SPAN = 4096
MOST = 128
"""The longest list of likeliest tokens."""
_SPAN, _GROUP = tl.constexpr(SPAN), tl.constexpr(64)
_BELOW_ALL = tl.constexpr(-(2**63))


@triton.jit
def _span_sum(x, inside):
    """(the largest, the sum of exp(x - largest) in float64) of a span."""
    top = tl.max(tl.where(inside, x, float("-inf")), 0)
    w = tl.where(inside, exp2((x - top) * LOG2_E), 0.0).to(tl.float64)
    return top, tl.sum(fold(tl.reshape(w, (1, _SPAN))), 0)


@triton.jit
def _join(tops, sums, row, SPANS: tl.constexpr, PAD: tl.constexpr):
    """Log of the sum of exponentials of a row, from those of its spans."""
    s = tl.arange(0, PAD)
    top = tl.load(tops + row * SPANS + s, mask=s < SPANS, other=float("-inf"))
    total = tl.load(sums + row * SPANS + s, mask=s < SPANS, other=0.0)
    m = tl.max(top, 0)
    parts = exp2((top - m) * LOG2_E).to(tl.float64) * total
    return m.to(tl.float64) + log(tl.sum(fold(tl.reshape(parts, (1, PAD))), 0))


@triton.jit
def _span_kernel(logits, tops, sums, stride, V: tl.constexpr):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = span * _SPAN + tl.arange(0, _SPAN)
    x = tl.load(logits + row * stride + ids, mask=ids < V, other=0.0)
    top, total = _span_sum(x, ids < V)
    at = row * tl.num_programs(1) + span
    tl.store(tops + at, top)
    tl.store(sums + at, total)


@triton.jit
def _log_softmax_kernel(
    logits,
    tops,
    sums,
    out,
    stride,
    V: tl.constexpr,
    SPANS: tl.constexpr,
    PAD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z = _join(tops, sums, row, SPANS, PAD)
    ids = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(logits + row * stride + ids, mask=ids < V, other=0.0)
    tl.store(out + row * V + ids, (x.to(tl.float64) - z).to(tl.float32), mask=ids < V)


@triton.jit
def _top_span_kernel(
    logits, chosen, tops, sums, ranks, group_keys, stride, V: tl.constexpr, GROUPS: tl.constexpr
):
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = span * _SPAN + tl.arange(0, _SPAN)
    x = tl.load(logits + row * stride + ids, mask=ids < V, other=0.0)
    top, total = _span_sum(x, ids < V)
    mine = tl.load(chosen + row)
    x_mine = tl.load(logits + row * stride + mine, mask=(mine >= 0) & (mine < V), other=0.0)
    ahead = (ids < V) & ((x > x_mine) | ((x == x_mine) & (ids < mine)))
    at = row * tl.num_programs(1) + span
    tl.store(tops + at, top)
    tl.store(sums + at, total)
    tl.store(ranks + at, tl.sum(ahead.to(tl.int32), 0))
    key = tl.reshape(tl.where(ids < V, ordered(x), LOWEST), (_SPAN // _GROUP, _GROUP))
    group = span * (_SPAN // _GROUP) + tl.arange(0, _SPAN // _GROUP)
    tl.store(group_keys + row * GROUPS + group, tl.max(key, 1), mask=group < GROUPS)


@triton.jit
def _packed(key, index):
    """(key, index) as one number that is larger for larger keys and, among those, for lower indices."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _top_kernel(
    logits,
    chosen,
    tops,
    sums,
    ranks,
    group_keys,
    chosen_log_prob,
    chosen_rank,
    top_ids,
    top_log_probs,
    stride,
    V: tl.constexpr,
    SPANS: tl.constexpr,
    PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z = _join(tops, sums, row, SPANS, PAD)
    mine = tl.load(chosen + row)
    x_mine = tl.load(logits + row * stride + mine, mask=(mine >= 0) & (mine < V), other=0.0)
    tl.store(chosen_log_prob + row, (x_mine.to(tl.float64) - z).to(tl.float32))
    s = tl.arange(0, PAD)
    ahead = tl.sum(tl.load(ranks + row * SPANS + s, mask=s < SPANS, other=0), 0)
    tl.store(chosen_rank + row, ahead.to(tl.int64) + 1)
    if COUNT > 0:
        g = tl.arange(0, GROUPS_PAD)
        keys = tl.load(group_keys + row * GROUPS + g, mask=g < GROUPS, other=LOWEST)
        packed = tl.where(g < GROUPS, _packed(keys, g), _BELOW_ALL)
        slot = tl.arange(0, COUNT_PAD)
        groups = tl.full((COUNT_PAD,), -1, tl.int32)
        for j in range(COUNT):
            best = tl.max(packed, 0)
            index = 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)
            groups = tl.where((slot == j) & (best > _BELOW_ALL), index, groups)
            packed = tl.where(packed == best, _BELOW_ALL, packed)
        ids = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        inside = (ids >= 0) & (ids < V)
        x = tl.load(logits + row * stride + ids, mask=inside, other=0.0)
        found = tl.where(inside, _packed(ordered(x), ids), _BELOW_ALL)
        for j in range(COUNT):
            best = tl.max(tl.max(found, 1), 0)
            index = 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)
            value = from_ordered((best >> 32).to(tl.int32))
            tl.store(top_ids + row * COUNT + j, index.to(tl.int64))
            tl.store(top_log_probs + row * COUNT + j, (value.to(tl.float64) - z).to(tl.float32))
            found = tl.where(found == best, _BELOW_ALL, found)


def _prepared(logits: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    spans = triton.cdiv(x.shape[1], SPAN)
    return x, spans, x.new_empty((len(x), spans)), x.new_empty((len(x), spans), dtype=torch.float64)


def log_softmax_cut(logits: torch.Tensor, *, width: int, warps: int) -> torch.Tensor:
    """`log_softmax` whose second pass takes `width` tokens at a time."""
    x, spans, tops, sums = _prepared(logits)
    S, V = x.shape
    out = x.new_empty((S, V))
    if S:
        _span_kernel[(S, spans)](x, tops, sums, x.stride(0), V=V, num_warps=warps, **UNFUSED)
        _log_softmax_kernel[(S, triton.cdiv(V, width))](
            x,
            tops,
            sums,
            out,
            x.stride(0),
            V=V,
            SPANS=spans,
            PAD=triton.next_power_of_2(spans),
            WIDTH=width,
            num_warps=4,
            **UNFUSED,
        )
    return out


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """log softmax of each row.

    Args:
        logits: float32 [S, V], rows at any stride.

    Returns:
        float32 [S, V], contiguous.

    Determinism:
        Row s depends on logits[s] alone.
    """
    return log_softmax_cut(logits, width=4096, warps=4)


def top_log_probs_cut(logits: torch.Tensor, chosen: torch.Tensor, count: int, *, warps: int) -> TopLogProbs:
    """`top_log_probs` with `warps` warps to a span."""
    if count > MOST:
        raise UnsupportedOpError(
            "top_log_probs: too many",
            expected=f"at most {MOST} on the GPU",
            got=str(count),
            fix="ask for fewer",
        )
    x, spans, tops, sums = _prepared(logits)
    S, V = x.shape
    groups = triton.cdiv(V, _GROUP.value)
    ranks, group_keys = (x.new_empty((S, n), dtype=torch.int32) for n in (spans, groups))
    result = TopLogProbs(
        x.new_empty((S,)),
        x.new_empty((S,), dtype=torch.int64),
        x.new_empty((S, count), dtype=torch.int64),
        x.new_empty((S, count)),
    )
    if S:
        _top_span_kernel[(S, spans)](
            x,
            chosen.contiguous(),
            tops,
            sums,
            ranks,
            group_keys,
            x.stride(0),
            V=V,
            GROUPS=groups,
            num_warps=warps,
            **UNFUSED,
        )
        _top_kernel[(S,)](
            x,
            chosen.contiguous(),
            tops,
            sums,
            ranks,
            group_keys,
            result.chosen,
            result.rank,
            result.ids,
            result.log_probs,
            x.stride(0),
            V=V,
            SPANS=spans,
            PAD=triton.next_power_of_2(spans),
            GROUPS=groups,
            GROUPS_PAD=triton.next_power_of_2(groups),
            COUNT=count,
            COUNT_PAD=triton.next_power_of_2(max(count, 1)),
            num_warps=8,
            **UNFUSED,
        )
    return result


def top_log_probs(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TopLogProbs:
    """The chosen tokens' log-probabilities and ranks, and the top `count` of each row.

    Args:
        logits: float32 [S, V], rows at any stride.
        chosen: int64 [S]; what is no token id (-1) gets values that mean nothing.
        count: from 0 to 128, at most V.

    Returns:
        TopLogProbs, on the same device; ties go to the lower token id.

    Raises:
        UnsupportedOpError: more than 128 tokens are asked for.

    Determinism:
        Row s depends on logits[s], chosen[s] and count alone; a token's value not on count.
    """
    return top_log_probs_cut(logits, chosen, count, warps=8)
