"""Faults that servers have, planted in our own kernels: each is refused, and the kernel without it admitted.

On a GPU each record is tried as it is. Triton's interpreter takes seconds for a row of attention or a sample:
there on few rows, and attention's results in float32, where so few still show the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from isobatch.audit.gpu_relations import GPU_RELATIONS
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU, GPU_ATTENTION
from isobatch.kernels.attention.gpu_rows import GpuKVCache
from isobatch.kernels.attention.triton import Tile, attention_tiled
from isobatch.kernels.bitclass import certify
from isobatch.kernels.gpu.data import case_variants
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.linear.gpu_record import LINEAR
from isobatch.kernels.moe.gpu_record import MOE
from isobatch.kernels.registry import Member, OpRecord
from isobatch.kernels.rms_norm.gpu_record import RMS_NORM
from isobatch.kernels.sampling.gpu_record import SAMPLE
from isobatch.kernels.stock import STOCK
from tests import gpu_faults as faults

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def _few(record: OpRecord, variant: str, *thresholds: int) -> OpRecord:
    """What the interpreter sees the end of; on a GPU the whole record."""
    return replace(record, thresholds=thresholds, variants=(variant,)) if INTERPRETED else record


def _in_float32(name: str, tile: Callable[[int], Tile]) -> Member:
    """Attention by the tile for a group's size, its result not rounded to 16 bits."""

    def run(q: torch.Tensor, cache: GpuKVCache, **arguments: Any) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        chosen = tile(q.shape[1] // cache.k.shape[1])
        return attention_tiled(q, cache, **arguments, tile=chosen, out=out)

    return Member(name, run, GPU_ATTENTION)


@dataclass(frozen=True)
class Planted:
    """A fault, and where it is planted.

    Args:
        record: that must refuse it.
        member: in whose launcher it is planted.
        parts: the module, its kernels with the fault, and the same rebuilt without it.
        rows: at which the interpreter certifies; on a GPU at all of the record's row counts.
    """

    record: OpRecord
    member: Member
    parts: tuple[ModuleType, Mapping[str, Any], Mapping[str, Any]]
    rows: int

    @property
    def faulty(self) -> Member:
        return faults.launching(self.member, self.parts[0], self.parts[1])

    @property
    def sound(self) -> Member:
        return faults.launching(self.member, self.parts[0], self.parts[2])


# Where four warps share sixteen rows, they share the columns of each.
ROW = _in_float32("row", lambda group: Tile(16, 1, 2, packed=True, height=group))
WARPS = _in_float32("warps", lambda _group: Tile(16, 4, 1, packed=False))
# One head size: each takes the compiler long, and the fault is none of its.
GROUPED = replace(_few(ATTENTION_GPU, "grouped/fp16", 2), variants=case_variants("grouped"))
ATTENTION = replace(GROUPED, members=(ROW, WARPS))
NORM = _few(RMS_NORM, "ragged/fp32", 8, 16, 24)
EXPERTS = _few(MOE, "cancelling/fp16", 4)
SAMPLES = _few(SAMPLE, "mixed", 4)
SUMS = {
    "attention's row sum across warps": Planted(ATTENTION, WARPS, faults.ATTENTION_SUM, 2),
    "a norm's sum across warps": Planted(NORM, NORM.member("rule"), faults.NORM_SUM, 24),
    "experts in order of arrival": Planted(EXPERTS, EXPERTS.canonical, faults.ARRIVAL, 5),
}
if not INTERPRETED:  # where millions of results are soon rounded, and atomics race
    unpacked = ATTENTION_GPU.member("unpacked")
    SUMS["attention as it serves"] = Planted(GROUPED, unpacked, faults.ATTENTION_SUM, 1)
    SUMS["experts added by atomics"] = Planted(EXPERTS, EXPERTS.canonical, faults.ATOMICS, 1)
NOISE = {
    "a counter keyed by slot": faults.NOISE_BY_SLOT,
    "a seed keyed by slot": faults.SEED_BY_SLOT,
}


@pytest.mark.parametrize("planted", SUMS.values(), ids=SUMS.keys())
def test_another_order_is_refused_and_the_written_one_admitted(planted: Planted) -> None:
    rows = (planted.rows,) if INTERPRETED else None
    verdict = certify(planted.record, planted.faulty, rows)
    assert not verdict.member
    assert verdict.difference is not None
    admitted = certify(planted.record, planted.sound, rows)
    assert admitted.member, str(admitted)


@pytest.mark.parametrize("planted", SUMS.values(), ids=SUMS.keys())
def test_an_order_chosen_from_load_is_caught(planted: Planted) -> None:
    served = faults.by_load(planted.sound, planted.faulty, rows=1)
    violation = GPU_RELATIONS["alone_equals_batched"](planted.record, served)
    assert violation is not None
    assert violation.difference is not None


def test_a_split_of_k_chosen_from_load_is_caught() -> None:
    member = Member("split", faults.split_by_load, STOCK)
    assert GPU_RELATIONS["alone_equals_batched"](LINEAR, member) is not None


@pytest.mark.parametrize("parts", NOISE.values(), ids=NOISE.keys())
@pytest.mark.parametrize("relation", ["position_is_free", "alone_equals_batched", "members_agree"])
def test_noise_keyed_by_slot_is_caught(relation: str, parts: Any) -> None:
    planted = Planted(SAMPLES, SAMPLE.member("rule"), parts, 4)
    assert GPU_RELATIONS[relation](planted.record, planted.faulty) is not None


def test_noise_keyed_by_seed_and_position_passes() -> None:
    planted = Planted(SAMPLES, SAMPLE.member("rule"), faults.NOISE_BY_SLOT, 4)
    for relation in ("alone_equals_batched", "members_agree"):
        violation = GPU_RELATIONS[relation](planted.record, planted.sound)
        assert violation is None, str(violation)
