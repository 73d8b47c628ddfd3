"""Every op, every member, seven relations, bit by bit; and a planted fault that each relation must catch."""

from __future__ import annotations

import pytest

from isobatch.audit.relations import RELATIONS
from isobatch.kernels.catalogue import RECORDS
from isobatch.kernels.registry import Member, OpRecord
from tests.faults import FAULTS, planted

MEMBERS = [
    pytest.param(record, member, id=f"{record.name}-{member.name}")
    for record in RECORDS.values()
    for member in record.members
]
PLANTED = [
    pytest.param(record, relation, id=f"{record.name}-{relation}")
    for record in RECORDS.values()
    for relation in RELATIONS
    # Embedding's rows are integers: they have no stride to vary, so there is no fault to plant.
    if (record.name, relation) != ("embedding", "layout_is_free")
]


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("record", "member"), MEMBERS)
def test_member_satisfies_relation(record: OpRecord, member: Member, relation: str) -> None:
    violation = RELATIONS[relation](record, member)
    assert violation is None, str(violation)


@pytest.mark.parametrize(("record", "relation"), PLANTED)
def test_relation_catches_its_planted_fault(record: OpRecord, relation: str) -> None:
    faulty = planted(record.member(record.production), FAULTS[relation])
    violation = RELATIONS[relation](record, faulty)
    assert violation is not None, f"{relation} let a planted fault pass in {record.name}"
    assert violation.op == record.name
