"""Certification: a kernel joins a bit class only by giving the canonical kernel's bits.

The inputs are such that another order cannot hide, and that claim is itself checked: the same sum, taken in
another order, must give other bits on them, or no certificate is issued.
"""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.bits import Difference, bits_equal, first_difference
from isobatch.errors import IntegrityError
from isobatch.kernels.registry import Member, OpRecord


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate is a member.

    Args:
        op: the record's name.
        candidate: the candidate's name.
        member: it gave the canonical bits on every input tried.
        inputs: how many cases were compared.
        refuted_by: the case on which it differed, as "variant, rows", or None.
        difference: the first differing element there, or None.
    """

    op: str
    candidate: str
    member: bool
    inputs: int
    refuted_by: str | None = None
    difference: Difference | None = None

    def __str__(self) -> str:
        if self.member:
            return f"{self.op}/{self.candidate}: member, equal on {self.inputs} inputs"
        return f"{self.op}/{self.candidate}: not a member: {self.refuted_by}: {self.difference}"


def discriminates(record: OpRecord, variant: str) -> bool:
    """Whether another order of summation shows on this variant's data.

    Returns:
        True if the reordered case gives other bits, or if the record has none.
    """
    if record.reorder is None:
        return True
    pair = record.reorder(record.draw(f"{record.name}/{variant}/probe", 16, variant))
    before, after = pair.before.call(record.canonical), pair.back(pair.after.call(record.canonical))
    return not all(bits_equal(a, b) for a, b in zip(before, after, strict=True))


def certify(record: OpRecord, candidate: Member, row_counts: tuple[int, ...] | None = None) -> Verdict:
    """Compares a candidate with the canonical member, bit by bit, over every variant and row count.

    Args:
        record: the op.
        candidate: what wants to join.
        row_counts: rows to try; the record's own by default, which straddle every tile edge.

    Returns:
        The verdict, with the first differing element if there is one.

    Raises:
        IntegrityError: there are no inputs, or a variant's data could not have told two orders apart.

    Determinism:
        The inputs are a function of the record; the same on every machine.
    """
    compared = 0
    if not record.variants:
        raise IntegrityError(f"{record.name} has no inputs to certify {candidate.name} on")
    for variant in record.variants:
        if not discriminates(record, variant):
            raise IntegrityError(f"inputs of {record.name}/{variant} cannot tell one order from another")
        for rows in row_counts or record.row_counts():
            case = record.draw(f"{record.name}/{variant}/{rows}", rows, variant)
            expected, got = case.call(record.canonical), case.call(candidate)
            compared += 1
            for left, right in zip(expected, got, strict=True):
                if not bits_equal(left, right):
                    where = f"{variant}, {rows} rows"
                    return Verdict(
                        record.name, candidate.name, False, compared, where, first_difference(left, right)
                    )
    return Verdict(record.name, candidate.name, True, compared)
