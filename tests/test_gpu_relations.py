"""Every GPU op, every member, seven relations, bit by bit, and a planted fault that each must catch.

Without a GPU, Triton's interpreter runs the kernels, with dot products in the written order. It has no
streams and no graphs, so two relations are left to the GPU.
"""

from __future__ import annotations

import pytest

from isobatch.audit.gpu_relations import GPU_RELATIONS
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.registry import Member, OpRecord
from tests.faults import FAULTS, planted

# Neighbours are poisoned with infinity, and NumPy, which interprets, says so.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

_NEEDS_GPU = {"rerun_repeats", "graph_equals_eager"}
RELATIONS = [name for name in GPU_RELATIONS if not (INTERPRETED and name in _NEEDS_GPU)]
# The interpreter takes milliseconds for each call of a helper: there, the records that are sums of products,
# which tests/test_gpu_pointwise.py leaves out; on the GPU, all.
RECORDS = [
    record for record in GPU_RECORDS.values() if not INTERPRETED or record.name in ("linear", "gated", "moe")
]
CASES = [
    pytest.param(record, member, relation, id=f"{record.name}-{member.name}-{relation}")
    for record in RECORDS
    for member in record.members
    for relation in RELATIONS
    if member.capturable or relation != "graph_equals_eager"
]
PLANTED = [
    pytest.param(record, relation, id=f"{record.name}-{relation}")
    for record in RECORDS
    for relation in RELATIONS
    # Embedding's rows are integers: they have no stride to vary, so there is no fault to plant.
    if relation in FAULTS and (record.name, relation) != ("embedding", "layout_is_free")
]


@pytest.mark.parametrize(("record", "member", "relation"), CASES)
def test_member_satisfies_relation(record: OpRecord, member: Member, relation: str) -> None:
    violation = GPU_RELATIONS[relation](record, member)
    assert violation is None, str(violation)


@pytest.mark.parametrize(("record", "relation"), PLANTED)
def test_relation_catches_its_planted_fault(record: OpRecord, relation: str) -> None:
    faulty = planted(record.member(record.production), FAULTS[relation])
    violation = GPU_RELATIONS[relation](record, faulty)
    assert violation is not None, f"{relation} let a planted fault pass in {record.name}"
