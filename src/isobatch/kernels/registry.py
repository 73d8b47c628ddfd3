"""What an op is: its written order, its members, and everything a test needs to know to test it.

A new op, or a new member of one, is tested by being registered: tests and certification read the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from isobatch.errors import UnknownKeyError
from isobatch.kernels.coding import CodedRows
from isobatch.kernels.layout import Layout

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """One way to compute an op. Members of one record on one device share a bit class.

    Args:
        name: unique within the record.
        function: the launcher.
        layout: how it wants weights and caches.
        capturable: whether a CUDA graph can record it; what waits for the host cannot be recorded.
    """

    name: str
    function: Callable[..., Any]
    layout: Layout
    capturable: bool = True


class Case(Protocol):
    """Inputs of an op whose rows are promised to be independent of one another."""

    @property
    def rows(self) -> int:
        """Rows of the outputs."""

    def prepare(self, member: Member) -> Callable[[], Outputs]:
        """Everything but the call itself: what is returned touches the device alone, and can be captured."""

    def call(self, member: Member) -> Outputs:
        """Runs a member; each output has one leading entry per row."""

    def take(self, indices: Sequence[int]) -> Case:
        """The case of these rows only, in this order."""

    def poison(self, keep: Sequence[int], value: float) -> Case:
        """The same case, with `value` in every input that belongs to no kept row."""

    def relayout(self) -> Case:
        """The same values at other addresses, strides and paddings."""


@dataclass(frozen=True, slots=True)
class Reordering:
    """Two cases with one exact result and two orders of summation.

    Args:
        before: a case.
        after: the same terms in another order.
        back: maps outputs of `after` onto those of `before`.
    """

    before: Case
    after: Case
    back: Callable[[Outputs], Outputs] = lambda outputs: outputs


@dataclass(frozen=True, slots=True)
class OpRecord:
    """Everything known about an op.

    Args:
        name: as in `ops`.
        order: the written order of summation.
        free_axes: what may vary from call to call, and no row's bits may depend on.
        fixed_axes: what the model fixes; the order may depend on it.
        members: certified against the first, which is canonical: the plainest statement of the order.
        production: the member that serves.
        stock: what torch runs, for comparison; not a member.
        reference: the same function in float64, called like a member in the stock layout; None where
            nothing is rounded.
        draw: (name, rows, variant) -> Case.
        variants: shapes and kinds of data that `draw` knows.
        thresholds: row counts at which some member changes tile, loop or split.
        coded: those of `variants` whose weight is coded. They have no golden digests: certification gives
            them the canonical bits on the widened weight, which the digests of the others hold.
        reorder: makes a reordering of a drawn case; None where nothing is summed, or where float64 sums are
            rounded to float32, so that another order would not show.
    """

    name: str
    order: str
    free_axes: tuple[str, ...]
    fixed_axes: tuple[str, ...]
    members: tuple[Member, ...]
    production: str
    stock: Member
    reference: Callable[..., Any] | None
    draw: Callable[[str, int, str], Case]
    variants: tuple[str, ...]
    thresholds: tuple[int, ...]
    coded: tuple[str, ...] = ()
    reorder: Callable[[Any], Reordering] | None = None

    @property
    def canonical(self) -> Member:
        """The member that defines the class."""
        return self.members[0]

    def member(self, name: str) -> Member:
        """The member of this name.

        Raises:
            UnknownKeyError: there is none.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise UnknownKeyError(f"member of {self.name}", name, [m.name for m in self.members])

    def row_counts(self) -> tuple[int, ...]:
        """Row counts that straddle every threshold: below, at, and above each."""
        counts = {1, 2, 3} | {t + d for t in self.thresholds for d in (-1, 0, 1)}
        return tuple(sorted(c for c in counts if c > 0))


def as_outputs(result: Any) -> Outputs:
    """A launcher's result as a tuple of tensors."""
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, tuple):
        return result
    return tuple(getattr(result, name) for name in result.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class RowCase:
    """The case of an op whose inputs are either per row or shared by all rows.

    Args:
        per_row: arguments by name, each a tensor with one leading entry per row.
        shared: arguments by name, the same for all rows.
        weights: names in `shared` that are CodedRows, to be laid out as the member wants.
        group: (name, type): gathers all per-row arguments but the first into one dataclass argument.
    """

    per_row: dict[str, torch.Tensor]
    shared: dict[str, Any]
    weights: tuple[str, ...] = ()
    group: tuple[str, type] | None = None

    @property
    def rows(self) -> int:
        """Rows of the outputs."""
        return len(next(iter(self.per_row.values())))

    def prepare(self, member: Member) -> Callable[[], Outputs]:
        """Lays out the weights and groups the arguments."""
        shared = dict(self.shared)
        for name in self.weights:
            rows: CodedRows = shared[name]
            weight = member.layout.weight.empty(len(rows), rows.codes.shape[1], rows.coding)
            weight.put(0, rows)
            shared[name] = weight
        per_row: dict[str, Any] = dict(self.per_row)
        if self.group is not None:
            name, kind = self.group
            first, *rest = per_row
            per_row = {first: per_row[first], name: kind(**{key: per_row[key] for key in rest})}
        return lambda: as_outputs(member.function(**per_row, **shared))

    def call(self, member: Member) -> Outputs:
        """Runs a member on this case."""
        return self.prepare(member)()

    def take(self, indices: Sequence[int]) -> RowCase:
        """The case of these rows only, in this order."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        return replace(self, per_row={k: v[chosen] for k, v in self.per_row.items()})

    def poison(self, keep: Sequence[int], value: float) -> RowCase:
        """The same case, with `value` in every float that belongs to no kept row, and 0 in every integer."""
        others = torch.ones(self.rows, dtype=torch.bool)
        others[list(keep)] = False
        poisoned = {}
        for name, tensor in self.per_row.items():
            poisoned[name] = tensor.clone()
            poisoned[name][others] = value if tensor.is_floating_point() else 0
        return replace(self, per_row=poisoned)

    def relayout(self) -> RowCase:
        """The same values in rows that are padded, at an odd offset, surrounded by NaN."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point() or tensor.dim() < 2:
                return tensor
            width = tensor[0].numel()
            room = tensor.new_full((tensor.shape[0] * (width + 5) + 3,), float("nan"))
            strides = (width + 5, *tensor.contiguous().stride()[1:])
            moved = room.as_strided(tensor.shape, strides, 3)
            return moved.copy_(tensor)

        return replace(self, per_row={k: move(v) for k, v in self.per_row.items()})
