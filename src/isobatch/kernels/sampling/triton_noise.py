"""The noise of sampling on the GPU: the CPU's random words, its weights, its scores, to the bit.

Launch what uses this with **UNFUSED (see `kernels.gpu.elementary`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.gpu.elementary import LOG2_E, exp2, log
from isobatch.kernels.sampling.philox import M0, M1, W0, W1

_M0, _M1, _W0, _W1 = (tl.constexpr(int(word)) for word in (M0, M1, W0, W1))
_INTERPRETED = tl.constexpr(INTERPRETED)
_MARGIN = tl.constexpr(0.01)
_LN2 = tl.constexpr(0.6931471805599453)
_THIRD = tl.constexpr(0.3333333333333333)
# Weights as integers: of 2^18 of them, none above 2^44, the sum stays below 2^62.
_ONE = tl.constexpr(2.0**44)
NOWHERE = tl.constexpr(0x7FFFFFFF)
"""The key of a token that is not kept, and an id beyond all ids."""


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds over a 128-bit counter under a 64-bit key; four uint32 words, all arguments of one shape."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, _M0), tl.umulhi(c2, _M1)
        low0 = tl.mul(c0, _M0, sanitize_overflow=False)
        low1 = tl.mul(c2, _M1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def noise_words(seed, position, group):
    """The random words of the four tokens 4 * group + 0, 1, 2, 3. `group` is a tile, or a scalar."""
    zero = (group * 0).to(tl.uint32)
    return philox(
        group.to(tl.uint32),
        zero + position.to(tl.uint32),
        zero,
        zero,
        zero + (seed & 0xFFFFFFFF).to(tl.uint32),
        zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def words_of(seed, position, ids):
    """The random word of each token id."""
    a, b, c, d = noise_words(seed, position, ids >> 2)
    lane = ids & 3
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


@triton.jit
def words_of_span(seed, position, start, WIDTH: tl.constexpr):
    """The random words of tokens start .. start + WIDTH - 1, start a multiple of 4: one Philox for four."""
    a, b, c, d = noise_words(seed, position, start // 4 + tl.arange(0, WIDTH // 4))
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def scaled(x, largest, temperature):
    """z = (x - max x) / temperature, as IEEE rounds it."""
    return tl.div_rn(x - largest, temperature + tl.zeros_like(x))


@triton.jit
def weight(z):
    """e^z as sampling weighs it: 1 for the likeliest."""
    return exp2(z * LOG2_E)


@triton.jit
def mass(w):
    """A weight as an integer, so that sums are exact in any order: floor(w * 2^44)."""
    return (w * _ONE).to(tl.int64)


@triton.jit
def _score(z, word):
    """z + g in float64, as the CPU has it."""
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10
    return z.to(tl.float64) - log(-log(1.0 - u))


@triton.jit
def _lg2(x):
    """log2(x), approximately: the hardware's own instruction."""
    if _INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rough_exponential(word):
    """-log(1 - u) in float32, u the word's fraction of 2^32."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386962890625e-10
    v = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386962890625e-10
    series = u * (1.0 + u * (0.5 + u * (_THIRD + u * 0.25)))
    return tl.where(u < 0.125, series, -_lg2(v) * _LN2)


@triton.jit
def _rough_score(z, word):
    """The score in float32, within 0.001 where it can win: above -4, where most of its error is that of z."""
    return z - _lg2(rough_exponential(word)) * _LN2


@triton.jit
def noisiest(z, keep, word, ids, seed, position, x_row, largest, temperature, best, best_id):
    """The largest z + g of a tile and of what was best before; the lowest id among equals.

    Float32 finds the few that can win, and only those are scored in float64.
    """
    rough = tl.where(keep, _rough_score(z, word), float("-inf"))
    current = tl.max(rough, 0)
    # The likeliest token is always kept, and no noise is below -3.2: what is lower than -4 never wins.
    least = tl.maximum(tl.maximum(current, best.to(tl.float32)) - _MARGIN, -4.0)
    while current >= least:
        i = tl.min(tl.where(rough == current, ids, NOWHERE), 0)
        z_i = scaled(tl.load(x_row + i), largest, temperature)
        exact = _score(z_i, words_of(seed, position, i))
        better = (exact > best) | ((exact == best) & (i < best_id))
        best = tl.where(better, exact, best)
        best_id = tl.where(better, i, best_id)
        rough = tl.where(ids == i, float("-inf"), rough)
        current = tl.max(rough, 0)
    return best, best_id
