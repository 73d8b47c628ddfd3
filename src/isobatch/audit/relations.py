"""The seven relations that every op must satisfy, each a function that looks for a counterexample.

They read the registry, so a new op or member is tested by being registered. All compare bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from isobatch.bits import Difference, bits_equal, first_difference
from isobatch.kernels.bitclass import certify
from isobatch.kernels.cpu import jit
from isobatch.kernels.registry import Case, Member, OpRecord, Outputs

_ROWS = 41
"""Rows where one count is enough: not a multiple of any tile."""
_RERUNS = 20
_POISONS = (float("nan"), float("inf"), 3e38)


@dataclass(frozen=True, slots=True)
class Violation:
    """A counterexample.

    Args:
        relation: which was violated.
        op: the record's name.
        member: the member's name.
        where: the case.
        difference: the first differing element, or None where shapes differ.
    """

    relation: str
    op: str
    member: str
    where: str
    difference: Difference | None

    def __str__(self) -> str:
        return f"{self.op}/{self.member} violates {self.relation!r} at {self.where}: {self.difference}"


Relation = Callable[[OpRecord, Member], Violation | None]


def _compare(expected: Outputs, got: Outputs) -> tuple[bool, Difference | None]:
    for left, right in zip(expected, got, strict=True):
        if not bits_equal(left, right):
            comparable = left.shape == right.shape and left.dtype == right.dtype
            return False, first_difference(left, right) if comparable else None
    return True, None


def violated(
    relation: str, record: OpRecord, member: Member, where: str, expected: Outputs, got: Outputs
) -> Violation | None:
    """A violation if the two differ in any bit."""
    same, difference = _compare(expected, got)
    return None if same else Violation(relation, record.name, member.name, where, difference)


def _rows(outputs: Outputs, indices: Sequence[int]) -> Outputs:
    return tuple(output[list(indices)] for output in outputs)


def _cases(record: OpRecord, counts: Sequence[int]) -> Iterator[tuple[str, Case]]:
    for variant in record.variants:
        for rows in counts:
            yield f"{variant}, {rows} rows", record.draw(f"{record.name}/{variant}/{rows}", rows, variant)


def alone_equals_batched(record: OpRecord, member: Member) -> Violation | None:
    """A row alone has the bits it has in a batch, for row counts on both sides of every threshold."""
    for where, case in _cases(record, record.row_counts()):
        together = case.call(member)
        for row in sorted({0, case.rows // 2, case.rows - 1}):
            same, difference = _compare(case.take([row]).call(member), _rows(together, [row]))
            if not same:
                return Violation("alone equals batched", record.name, member.name, where, difference)
    return None


def position_is_free(record: OpRecord, member: Member) -> Violation | None:
    """A row's bits do not depend on its place among the others."""
    for where, case in _cases(record, [_ROWS]):
        together = case.call(member)
        for order in (list(range(case.rows))[::-1], [*range(7, case.rows), *range(7)]):
            same, difference = _compare(_rows(together, order), case.take(order).call(member))
            if not same:
                return Violation("position is free", record.name, member.name, where, difference)
    return None


def neighbours_are_inert(record: OpRecord, member: Member) -> Violation | None:
    """A row's bits do not depend on what the other rows hold: NaN, infinity, or huge numbers."""
    for where, case in _cases(record, [_ROWS]):
        together = case.call(member)
        for keep in ([0], [3, 17], [case.rows - 1]):
            for value in _POISONS:
                got = case.poison(keep, value).call(member)
                same, difference = _compare(_rows(together, keep), _rows(got, keep))
                if not same:
                    at = f"{where}, neighbours {value}"
                    return Violation("neighbours are inert", record.name, member.name, at, difference)
    return None


def layout_is_free(record: OpRecord, member: Member) -> Violation | None:
    """Strides, offsets, padding, block tables and what unused memory holds change nothing."""
    for where, case in _cases(record, [1, _ROWS]):
        same, difference = _compare(case.call(member), case.relayout().call(member))
        if not same:
            return Violation("layout is free", record.name, member.name, where, difference)
    return None


@contextmanager
def _busy_thread() -> Iterator[None]:
    """Keeps another thread at work on the same cores inside the block."""
    done = threading.Event()

    def work() -> None:
        left = torch.ones(192, 192)
        while not done.is_set():
            torch.mm(left, left)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def rerun_repeats(record: OpRecord, member: Member) -> Violation | None:
    """Twenty runs give the same bits while another thread keeps the machine busy."""
    for where, case in _cases(record, [_ROWS]):
        expected = tuple(output.clone() for output in case.call(member))
        with _busy_thread():
            for _ in range(_RERUNS):
                same, difference = _compare(expected, case.call(member))
                if not same:
                    return Violation("rerun repeats", record.name, member.name, where, difference)
    return None


def threads_are_free(record: OpRecord, member: Member) -> Violation | None:
    """One, two and three threads give the same bits."""
    for where, case in _cases(record, [1, _ROWS]):
        with jit.threads(1):
            expected = case.call(member)
        for count in (2, 3):
            with jit.threads(count):
                same, difference = _compare(expected, case.call(member))
            if not same:
                at = f"{where}, {count} threads"
                return Violation("threads are free", record.name, member.name, at, difference)
    return None


def members_agree(record: OpRecord, member: Member) -> Violation | None:
    """The member gives the canonical bits: it is certified."""
    verdict = certify(record, member)
    if verdict.member:
        return None
    where = verdict.refuted_by or ""
    return Violation("members agree", record.name, member.name, where, verdict.difference)


RELATIONS: dict[str, Relation] = {
    relation.__name__: relation
    for relation in (
        alone_equals_batched,
        position_is_free,
        neighbours_are_inert,
        layout_is_free,
        rerun_repeats,
        threads_are_free,
        members_agree,
    )
}
