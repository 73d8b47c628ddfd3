"""The record of the fused step before attention. Its canonical member is the unfused chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from isobatch.kernels.data import floats, integers
from isobatch.kernels.gpu.data import case_variants, split_variant, to_device
from isobatch.kernels.layout import PAGE, PagedRows
from isobatch.kernels.qkv import triton
from isobatch.kernels.registry import Member, OpRecord, Outputs, Reordering, RowCase
from isobatch.kernels.rms_norm import stock as norm_stock
from isobatch.kernels.rms_norm.triton import rms_norm
from isobatch.kernels.rotary import stock as rotary_stock
from isobatch.kernels.rotary.table import inverse_frequencies, rotary_table
from isobatch.kernels.rotary.triton import rotary
from isobatch.kernels.stock import STOCK


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of one layer, [blocks, Hkv, 16, D]."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class QkvCase:
    """Packed rows and where they go; the outputs: what is returned, and what is in the slots then.

    Args:
        inner: qkv and positions by row; cos, sin, weights and eps for all.
        kv_heads: Hkv.
        head_size: D.
        shift: moves every slot.
        fill: what the cache holds before.
    """

    inner: RowCase
    kv_heads: int
    head_size: int
    shift: int = 0
    fill: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of the outputs."""
        return self.inner.rows

    def prepare(self, member: Member) -> Callable[[], Outputs]:
        """Makes a fresh cache, and picks the slots."""
        qkv = self.inner.per_row["qkv"]
        blocks = -(-self.rows // PAGE) + 3
        shape = (blocks, self.kv_heads, PAGE, self.head_size)
        # What is in float64 writes float64.
        dtype = torch.float64 if member.function is REFERENCE else qkv.dtype
        cache = Pages(*(torch.full(shape, self.fill, dtype=dtype, device=qkv.device) for _ in "kv"))
        # A step of 17 and a number of slots that is a multiple of 16 but not of 17 meet no slot twice.
        room = blocks * PAGE if blocks % 17 else (blocks - 1) * PAGE
        slots = (torch.arange(self.rows, device=qkv.device) * 17 + self.shift) % room
        at = (slots // PAGE, slice(None), slots % PAGE)
        rows = PagedRows(slots, slots, slots, slots, settled=True)  # torch's kernels let nobody begin early

        def run() -> Outputs:
            q, own = member.function(**self.inner.per_row, **self.inner.shared, cache=cache, rows=rows)
            return q, *own, cache.k[at], cache.v[at]

        return run

    def call(self, member: Member) -> Outputs:
        """Runs a member over a fresh cache."""
        return self.prepare(member)()

    def take(self, indices: Sequence[int]) -> QkvCase:
        """These rows only."""
        return replace(self, inner=self.inner.take(indices))

    def poison(self, keep: Sequence[int], value: float) -> QkvCase:
        """`value` in all other rows."""
        return replace(self, inner=self.inner.poison(keep, value))

    def relayout(self) -> QkvCase:
        """Padded rows, other slots, other garbage in unused memory."""
        return replace(self, inner=self.inner.relayout(), shift=self.shift + 19, fill=float("nan"))


# (query heads, key/value heads, head size, whether the model norms them)
_SHAPES = {"grouped": (6, 2, 64, True), "thirds": (3, 3, 96, True), "plain": (5, 1, 128, False)}


def draw(name: str, rows: int, variant: str) -> QkvCase:
    """Rows at random positions."""
    kind, dtype = split_variant(variant)
    H, Hkv, D, norm = _SHAPES[kind]
    cos, sin = (to_device(table) for table in rotary_table(inverse_frequencies(D, 100000.0), 512))
    per_row = {
        "qkv": to_device(floats(f"{name}/qkv", rows, (H + 2 * Hkv) * D), dtype),
        "positions": to_device(integers(f"{name}/positions", rows, 512)),
    }
    shared: dict[str, Any] = {"cos": cos, "sin": sin}
    if norm:
        for side in ("q_weight", "k_weight"):
            shared[side] = to_device(floats(f"{name}/{side}", D, kind="plain"), dtype)
        shared["eps"] = 1e-6
    return QkvCase(RowCase(per_row, shared), Hkv, D)


def _chain(norm: Any, turn: Any, dtype: torch.dtype | None = None) -> Any:
    def chain(
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
        """The separate ops, one after another."""
        _, kv_heads, _, D = cache.k.shape
        heads = qkv.to(dtype or qkv.dtype).reshape(len(qkv), -1, D)
        H = heads.shape[1] - 2 * kv_heads
        q, k, v = heads[:, :H], heads[:, H:-kv_heads], heads[:, -kv_heads:]
        if q_weight is not None and k_weight is not None:
            q = norm(q.reshape(-1, D), q_weight, eps)[0].view(q.shape)
            k = norm(k.reshape(-1, D), k_weight, eps)[0].view(k.shape)
        at = (rows.slots // PAGE, slice(None), rows.slots % PAGE)
        k = turn(k, positions, cos, sin)
        cache.k[at], cache.v[at] = k, v
        return turn(q, positions, cos, sin), (k, v)

    return chain


def reorder(case: QkvCase) -> Reordering:
    """Heads of which each half is rolled by one: the norm's tree pairs others, the rotation the same."""
    D, half = case.head_size, case.head_size // 2

    def roll(x: torch.Tensor, by: int) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], -1, half).roll(by, -1).reshape(x.shape)

    shared = {k: roll(v, 1) if isinstance(v, torch.Tensor) else v for k, v in case.inner.shared.items()}
    heads = case.inner.per_row["qkv"].reshape(case.rows, -1, D)
    per_row = {**case.inner.per_row, "qkv": roll(heads, 1).reshape(case.rows, -1)}
    after = replace(case, inner=RowCase(per_row, shared))
    return Reordering(case, after, lambda outputs: tuple(roll(o, -1) for o in outputs))


def _member(heads: int, warps: int) -> Member:
    function = partial(triton.qk_norm_rotary_write_tiled, heads=heads, warps=warps)
    return Member(f"fused {heads}x{warps}", function, STOCK)


REFERENCE = _chain(norm_stock.rms_norm_ref, rotary_stock.rotary_ref, torch.float64)

QK_NORM_ROTARY_WRITE = OpRecord(
    name="qk_norm_rotary_write",
    order=triton.__doc__ or "",
    free_axes=("rows", "slots", "tile"),
    fixed_axes=("H", "Hkv", "D", "eps", "dtype"),
    members=(
        Member("chain", _chain(rms_norm, rotary), STOCK),
        Member("rule", triton.qk_norm_rotary_write, STOCK),
        *(_member(heads, warps) for heads, warps in ((1, 1), (4, 1), (16, 4))),
    ),
    production="rule",
    stock=Member("torch", _chain(norm_stock.llama_rms_norm, rotary_stock.rotary_in_dtype), STOCK),
    reference=REFERENCE,
    draw=draw,
    variants=case_variants(*_SHAPES),
    thresholds=(16,),
)
