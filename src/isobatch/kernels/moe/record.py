"""The record of the mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from isobatch.kernels.coding import BF16, F32, Q4_OFFSET, Q8, CodedRows, Coding
from isobatch.kernels.cpu.layout import CPU, WIDENED
from isobatch.kernels.data import coded, floats
from isobatch.kernels.layout import Layout, Stack
from isobatch.kernels.moe import cpu, stock
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.registry import Member, OpRecord, Outputs, Reordering, RowCase, as_outputs
from isobatch.kernels.stock import STOCK

_EXPERTS, _ACTIVE = 12, 3
# K and I that no panel divides, and K of more than one block; with a coding, whole groups of it.
_WIDTHS, _CODED_WIDTHS = (603, 90), (608, 96)
_RENORMALISED = {"shares of the chosen": True, "shares of all": False}
_CODED = {"bf16": BF16, "q8": Q8, "q4 with offset": Q4_OFFSET}


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Experts as a checkpoint has them, the fields being those of `Experts`."""

    router: CodedRows
    gate_up: list[CodedRows]
    down: list[CodedRows]
    renormalise: bool

    def laid_out(self, layout: Layout) -> Experts[Any, Any]:
        """The same as a member wants them."""

        def stack(matrices: list[CodedRows]) -> Stack:
            outputs, inputs = matrices[0].codes.shape
            made = layout.stack.empty(outputs, inputs, [rows.coding for rows in matrices])
            for weight, rows in zip(made.weights, matrices, strict=True):
                weight.put(0, rows)
            return made

        router = layout.weight.empty(len(self.router), self.router.codes.shape[1], self.router.coding)
        router.put(0, self.router)
        return Experts(router, stack(self.gate_up), stack(self.down), _ACTIVE, self.renormalise)


class ExpertsCase(RowCase):
    """Rows against experts, which are laid out as the member wants."""

    def call(self, member: Member) -> Outputs:
        """Runs a member on this case."""
        drawn: _Drawn = self.shared["experts"]
        return as_outputs(member.function(**self.per_row, experts=drawn.laid_out(member.layout)))


def _matrix(name: str, coding: Coding, outputs: int, inputs: int) -> CodedRows:
    """Small enough that gates neither vanish nor pass everything."""
    if coding != F32:
        rows = coded(name, coding, outputs, inputs)
        if rows.scales is None:
            return CodedRows.of(rows.codes / 2**10)
        offsets = None if rows.offsets is None else rows.offsets / 2**8
        return replace(rows, scales=rows.scales / 2**13, offsets=offsets)
    return CodedRows.of(floats(name, outputs, inputs, kind="plain") / 4)


def draw(name: str, rows: int, variant: str) -> ExpertsCase:
    """x [rows, K] against a layer of experts. The router is float32, as most files have it."""
    coding = _CODED.get(variant, F32)
    K, inner = _WIDTHS if coding == F32 else _CODED_WIDTHS
    router = floats(f"{name}/router", _EXPERTS, K, kind="plain") / 2
    experts = _Drawn(
        CodedRows.of(router),
        [_matrix(f"{name}/gate_up/{e}", coding, 2 * inner, K) for e in range(_EXPERTS)],
        [_matrix(f"{name}/down/{e}", coding, K, inner) for e in range(_EXPERTS)],
        _RENORMALISED.get(variant, True),
    )
    return ExpertsCase({"x": floats(f"{name}/x", rows, K, kind="plain")}, {"experts": experts})


def reorder(case: ExpertsCase) -> Reordering:
    """The same products, k descending."""
    drawn: _Drawn = case.shared["experts"]

    def flip(rows: CodedRows) -> CodedRows:
        return CodedRows.of(rows.floats().flip(1))

    flipped = replace(drawn, router=flip(drawn.router), gate_up=[flip(rows) for rows in drawn.gate_up])
    after = replace(case, per_row={"x": case.per_row["x"].flip(1)}, shared={"experts": flipped})
    return Reordering(case, after)


MOE = OpRecord(
    name="moe",
    order=cpu.__doc__ or "",
    free_axes=("tokens", "coding"),
    fixed_axes=("E", "A", "K", "I"),
    members=(
        Member("by token", cpu.moe_by_token, WIDENED),
        Member("by expert", cpu.moe_by_expert, CPU),
    ),
    production="by expert",
    stock=Member("torch", stock.moe_by_expert, STOCK),
    reference=stock.moe_ref,
    draw=draw,
    variants=(*_RENORMALISED, *_CODED),
    # 16 tokens of 12 experts with 3 active are 4 rows per expert, on average; 48, 12.
    thresholds=(4, 16, 48),
    coded=tuple(_CODED),
    reorder=reorder,
)
