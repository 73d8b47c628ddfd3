"""Query and key norm, rotary embedding and the write to the KV cache, fused. GPU only.

Written order: that of the chain rms_norm (over each head, if the model has those norms), rotary, write_kv,
each rounded to the dtype as the separate ops round it: bit-equal to the chain, which is the canonical member.
Shape letters: T rows, H query heads, Hkv key/value heads, D head size, C context.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import (
    ask_ahead,
    early,
    inputs_ready,
    looked_up,
    next_may_begin,
)
from isobatch.kernels.gpu.rows import fold, inverse_root_mean, rotated, scaled, squares
from isobatch.kernels.layout import PAGE, PagedRows

_PAGE = tl.constexpr(PAGE)


@triton.jit
def _normed(a, b, row, weight_a, weight_b, is_head, eps, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of each head, normalised over the whole head by the tree of `fold`."""
    if HALF == BLOCK:
        # The tree's last step joins the halves, so each folds by itself.
        total = fold(squares(a)) + fold(squares(b))
    else:
        d = tl.arange(0, 2 * BLOCK)[None, :]
        total = fold(squares(tl.load(row + d, mask=is_head & (d < 2 * HALF), other=0.0)))
    scale = inverse_root_mean(total, HALF * 2.0, eps)[:, None]
    return scaled(a, scale, weight_a), scaled(b, scale, weight_b)


@triton.jit
def _turned(
    row,
    is_head,
    position,
    cos,
    sin,
    weight,
    eps,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Both halves of each head, normalised if the model does that, and turned.

    All is asked for before anything is computed. What is the same for each head is loaded for each, from the
    nearest cache: so it lies where it is needed, and nothing goes through shared memory.
    """
    c = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (HEADS, BLOCK))
    inside = is_head & (c < HALF)
    a = tl.load(row + c, mask=inside, other=0.0)
    b = tl.load(row + c + HALF, mask=inside, other=0.0)
    angle = position * HALF + c
    cosine = tl.load(cos + angle, mask=c < HALF, other=0.0)
    sine = tl.load(sin + angle, mask=c < HALF, other=0.0)
    if NORM:
        weight_a = tl.load(weight + c, mask=c < HALF, other=0.0)
        weight_b = tl.load(weight + c + HALF, mask=c < HALF, other=0.0)
        a, b = _normed(a, b, row, weight_a, weight_b, is_head, eps, HALF, BLOCK)
    return rotated(a, b, cosine, sine)


@triton.jit
def _qk_norm_rotary_write_kernel(
    qkv,
    positions,
    cos,
    sin,
    slots,
    q_weight,
    k_weight,
    turned,
    k_cache,
    v_cache,
    eps,
    stride,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    SETTLED: tl.constexpr,
):
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not SETTLED:
        inputs_ready()
        next_may_begin()
    slot, position = looked_up(slots + t, SETTLED), looked_up(positions + t, SETTLED)
    if SETTLED:
        if part == 0:
            line = tl.arange(0, (BLOCK + 15) // 16) * 16
            ask_ahead(cos + position * HALF + tl.minimum(line, HALF - 1))
            ask_ahead(sin + position * HALF + tl.minimum(line, HALF - 1))
            if NORM:
                ask_ahead(q_weight + 2 * tl.minimum(line, HALF - 1))
                ask_ahead(k_weight + 2 * tl.minimum(line, HALF - 1))
        inputs_ready()
        next_may_begin()
    Q_PARTS: tl.constexpr = (H + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (HKV + HEADS - 1) // HEADS
    D: tl.constexpr = 2 * HALF
    c = tl.arange(0, BLOCK)[None, :]
    lane = tl.arange(0, HEADS)[:, None]
    row = qkv + t * stride
    if part < Q_PARTS:
        h = part * HEADS + lane
        a, b = _turned(row + h * D, h < H, position, cos, sin, q_weight, eps, HALF, HEADS, BLOCK, NORM)
        out = turned + (t * (H + HKV) + h) * D + c
        tl.store(out, a, mask=(h < H) & (c < HALF))
        tl.store(out + HALF, b, mask=(h < H) & (c < HALF))
    else:
        block, offset = slot // _PAGE, slot % _PAGE
        stored = tl.where(slot >= 0, HKV, 0)
        if part < Q_PARTS + KV_PARTS:
            h = (part - Q_PARTS) * HEADS + lane
            at = row + (H + h) * D
            a, b = _turned(at, h < HKV, position, cos, sin, k_weight, eps, HALF, HEADS, BLOCK, NORM)
            kept = (h < stored) & (c < HALF)
            out = k_cache + block * k_block + h * k_head + offset * k_slot + c
            tl.store(out, a, mask=kept)
            tl.store(out + HALF, b, mask=kept)
            out = turned + (t * (H + HKV) + H + h) * D + c
            tl.store(out, a, mask=(h < HKV) & (c < HALF))
            tl.store(out + HALF, b, mask=(h < HKV) & (c < HALF))
        else:
            h = (part - Q_PARTS - KV_PARTS) * HEADS + lane
            d = tl.arange(0, 2 * BLOCK)[None, :]
            moved = (h < stored) & (d < D)
            value = tl.load(row + (H + HKV + h) * D + d, mask=moved, other=0.0)
            tl.store(v_cache + block * v_block + h * v_head + offset * v_slot + d, value, mask=moved)


def qk_norm_rotary_write_tiled(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: Any,
    rows: PagedRows,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    heads: int,
    warps: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`qk_norm_rotary_write` with `heads` heads (a power of two) and `warps` warps to a program."""
    T, width = qkv.shape
    _, kv_heads, _, D = cache.k.shape
    H = width // D - 2 * kv_heads
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    turned = torch.empty((T, H + kv_heads, D), dtype=qkv.dtype, device=qkv.device)
    if T:
        _qk_norm_rotary_write_kernel[(T, triton.cdiv(H, heads) + 2 * triton.cdiv(kv_heads, heads))](
            qkv,
            positions.contiguous(),
            cos,
            sin,
            rows.slots.contiguous(),
            qkv if q_weight is None else q_weight,
            qkv if k_weight is None else k_weight,
            turned,
            cache.k,
            cache.v,
            eps,
            qkv.stride(0),
            *cache.k.stride()[:3],
            *cache.v.stride()[:3],
            H=H,
            HKV=kv_heads,
            HALF=D // 2,
            HEADS=heads,
            BLOCK=triton.next_power_of_2(D // 2),
            NORM=q_weight is not None,
            # A copy made just now is by the kernel right before.
            SETTLED=rows.settled and positions.is_contiguous() and rows.slots.is_contiguous(),
            num_warps=warps,
            **early(),
        )
    q, k = turned.split_with_sizes((H, kv_heads), 1)
    return q, (k, qkv.view(T, H + 2 * kv_heads, D)[:, -kv_heads:])


def qk_norm_rotary_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: Any,
    rows: PagedRows,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Normalises and turns queries and keys, and stores keys and values.

    Args:
        qkv: bfloat16 or float16 [T, (H + 2 Hkv) D]: query, key and value heads side by side.
        positions: int64 [T], each below C.
        cos: float32 [C, D/2], contiguous.
        sin: likewise.
        cache: its k and v are [blocks, Hkv, 16, D] of qkv's dtype, at any strides but the last, which is 1.
        rows: its slots say where each row's key and value go; a row whose slot is negative (padding in a
            captured graph) is written nowhere.
        q_weight: [D] of the same dtype, or None for models without these norms.
        k_weight: likewise; both or none.
        eps: of the norms.

    Returns:
        The queries, [T, H, D]; the keys and values, [T, Hkv, D] each. Views, the last axis contiguous.

    Determinism:
        Row t depends on qkv[t] and positions[t] alone, not on its slot.
    """
    return qk_norm_rotary_write_tiled(
        qkv, positions, cos, sin, cache, rows, q_weight, k_weight, eps, heads=8, warps=1
    )
