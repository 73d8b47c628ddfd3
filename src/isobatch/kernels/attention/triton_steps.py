"""The pieces of attention's written order, as device functions that every GPU member is made of.

Shape letters: ROWS query rows of a tile, SPAN keys of a block, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.gpu.overlap import looked_up
from isobatch.kernels.gpu.ptx import ex2, fma, mul, sub

_PLAIN = tl.constexpr(INTERPRETED)
SPAN = tl.constexpr(128)
PAGE = tl.constexpr(16)
COLUMNS = tl.constexpr(64)  # of a part of a head: a row of what the tensor core reads whole


@triton.jit
def product(a, b, acc):
    """Acc + a b by the tensor core; acc may be None.

    NumPy's order of summation changes with the shape, so the interpreter takes it in float64, where what the
    order changes is lost in rounding to float32.
    """
    if _PLAIN:
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return (exact if acc is None else exact + acc.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _chain2(x):
    low, high = tl.split(x)
    return low + high


@triton.jit
def _chain2_onto(t, x):
    low, high = tl.split(x)
    return (t + low) + high


@triton.jit
def _chain4(x):
    low, high = tl.split(x)
    return _chain2_onto(_chain2(low), high)


@triton.jit
def _chain4_onto(t, x):
    low, high = tl.split(x)
    return _chain2_onto(_chain2_onto(t, low), high)


@triton.jit
def _chain8(x):
    low, high = tl.split(x)
    return _chain4_onto(_chain4(low), high)


@triton.jit
def _chain8_onto(t, x):
    low, high = tl.split(x)
    return _chain4_onto(_chain4_onto(t, low), high)


@triton.jit
def _chain16(x):
    low, high = tl.split(x)
    return _chain8_onto(_chain8(low), high)


@triton.jit
def _chain16_onto(t, x):
    low, high = tl.split(x)
    return _chain8_onto(_chain8_onto(t, low), high)


@triton.jit
def lane_sums(p, ROWS: tl.constexpr):
    """Sums a block's weights in four lanes; lane t has the columns j with (j mod 8) // 2 == t, ascending.

    Every addition is written out, so the order holds however the compiler lays the columns over threads and
    warps. Where a thread already owns a lane of a row, as with cuDNN's own layout, nothing moves.
    """
    # j = 64 h3 + 32 h2 + 16 h1 + 8 h0 + 2 t + b; the highest digit goes last, to be split first.
    x = tl.permute(tl.reshape(p, (ROWS, 2, 2, 2, 2, 4, 2)), (0, 5, 6, 4, 3, 2, 1))
    low, high = tl.split(x)
    return _chain16_onto(_chain16(low), high)


@triton.jit
def softmax_block(s, m, lanes, c, ROWS: tl.constexpr):
    """One block of scores, -inf where a row must not look: its weights, the rescaling, and the new state."""
    x = mul(s, tl.full((ROWS, SPAN), 0.0, tl.float32) + c)
    top = tl.maximum(m, tl.max(x, 1))
    p = ex2(sub(x, tl.broadcast_to(top[:, None], (ROWS, SPAN))))
    alpha = ex2(sub(m, top))
    lanes = fma(lanes, tl.broadcast_to(alpha[:, None], (ROWS, 4)), lane_sums(p, ROWS))
    return p, alpha, top, lanes


@triton.jit
def row_total(lanes, ROWS: tl.constexpr):
    """(L_0 + L_1) + (L_2 + L_3)."""
    return tl.sum(tl.sum(tl.reshape(lanes, (ROWS, 2, 2)), 2), 1)


@triton.jit
def lane_sums_down(p, HEADS: tl.constexpr):
    """`lane_sums` of weights whose keys run down, [128, HEADS]; the result is [HEADS, 4] all the same."""
    x = tl.permute(tl.reshape(p, (2, 2, 2, 2, 4, 2, HEADS)), (6, 4, 5, 3, 2, 1, 0))
    low, high = tl.split(x)
    return _chain16_onto(_chain16(low), high)


@triton.jit
def pages_of(table, start, limit, SETTLED: tl.constexpr = False):
    """The pages [8] of a block of keys; from key `limit` on, of which one is before, any page that exists.

    The load is spelt in assembly to hide it from Triton's pipeliner, which would otherwise spend every other
    stage on it. SETTLED: as of `looked_up`.
    """
    entries = table + tl.minimum(start // PAGE + tl.arange(0, 8), (limit - 1) // PAGE)
    if SETTLED:
        return looked_up(entries, SETTLED)
    if _PLAIN:
        return tl.load(entries)
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [entries.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def first_pages(table, width, context, SETTLED: tl.constexpr):
    """`pages_of` the first block, read beside the context length and not after it.

    Args:
        table: a row of the block tables.
        width: of the row.
        context: the keys there are; of none, any page that exists is given.
        SETTLED: as of `looked_up`.
    """
    i = tl.arange(0, 8)
    entries = looked_up(table + tl.minimum(i, width - 1), SETTLED)
    return tl.where(i * PAGE < context, entries, looked_up(table, SETTLED))


@triton.jit
def page_rows(pages, block_stride, first, D: tl.constexpr, FROM, WIDTH: tl.constexpr):
    """Where the numbers of a block's keys lie: offsets [128, WIDTH] of columns FROM on.

    Args:
        pages: from `pages_of`.
        block_stride: numbers from one KV block to the next.
        first: numbers from a KV block's start to the head's page.
        D: head size.
        FROM: first column.
        WIDTH: columns.
    """
    inside = first + tl.arange(0, PAGE)[:, None] * D + FROM + tl.arange(0, WIDTH)[None, :]
    at = (pages.to(tl.int64) * block_stride)[:, None, None] + inside[None, :, :]
    # The compiler loses sight of columns that lie side by side when the shape changes.
    return tl.max_contiguous(tl.multiple_of(tl.reshape(at, (SPAN, WIDTH)), (1, 16)), (1, 16))


@triton.jit
def unseen_is_inert(acc, p, v, seen):
    """Undoes 0 * inf and 0 * NaN: a value that a row must not see is no part of its sum, whatever it is.

    `acc` was taken over the finite values alone. A row that does see a NaN or an infinity gets what the sum
    would have given it.
    """
    finite = (v == v) & (tl.abs(v) < float("inf"))
    if tl.min(finite.to(tl.int32)) == 0:
        for kind in range(4):
            # What a row sees: a NaN; an infinity by a weight that has rounded to zero; +inf; -inf.
            rows = seen & ((kind != 1) | (p == 0))
            high, low = v == float("inf"), v == float("-inf")
            values = ((kind == 0) & (v != v)) | ((kind < 3) & (kind > 0) & high) | ((kind % 2 == 1) & low)
            found = product(rows.to(p.dtype), values.to(p.dtype), None) > 0
            becomes = tl.where(kind < 2, float("nan"), tl.where(kind == 2, float("inf"), float("-inf")))
            acc += tl.where(found, becomes, 0.0)
    return acc


@triton.jit
def only_finite(v):
    """v with NaN and infinities replaced by zero."""
    return tl.where((v == v) & (tl.abs(v) < float("inf")), v, 0.0)
