"""The self test: does this machine give the bits that the fingerprint promises?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isobatch.kernels.bitclass import Verdict, certify
from isobatch.kernels.catalogue import RECORDS
from isobatch.kernels.registry import OpRecord
from isobatch.ops.environment import deviations
from isobatch.ops.fingerprint import computed_digests, golden_digests

Progress = Callable[[str], None]
"""Told what is about to be computed."""


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check.

    Args:
        name: what was checked.
        summary: how much of it.
        failures: what exactly is wrong, an entry each; none if all is well.
        details: all that was found, an entry each, for reports.
    """

    name: str
    summary: str
    failures: tuple[str, ...]
    details: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures


def check_arithmetic() -> Check:
    """Whether this thread, and those that kernels run on, keep subnormal numbers and round to nearest.

    The golden digests would differ as well; this says why.
    """
    return Check("IEEE arithmetic", "subnormals kept, rounding to nearest, on every thread", deviations())


def check_digests(progress: Progress) -> Check:
    """Whether the production members give the golden bits."""
    golden, computed = golden_digests(), computed_digests(progress)
    failures = [
        f"{name}: expected {golden.get(name, 'no such digest')}, got {computed.get(name, 'none')}"
        for name in sorted(golden.keys() | computed.keys())
        if golden.get(name) != computed.get(name)
    ]
    return Check("golden digests", f"{len(golden) - len(failures)} of {len(golden)} equal", tuple(failures))


def verdicts_on(records: Mapping[str, OpRecord], progress: Progress) -> list[Verdict]:
    """Certifies every member of some records."""
    verdicts = []
    for record in records.values():
        for member in record.members:
            progress(f"{record.name}/{member.name}")
            verdicts.append(certify(record, member))
    return verdicts


def check_members(progress: Progress, records: Mapping[str, OpRecord] | None = None) -> Check:
    """Whether all members of each bit class still agree, bit by bit.

    Args:
        progress: told each member.
        records: of the classes; those of the CPU by default.
    """
    verdicts = verdicts_on(RECORDS if records is None else records, progress)
    inputs = sum(verdict.inputs for verdict in verdicts)
    failures = tuple(str(verdict) for verdict in verdicts if not verdict.member)
    certified = len(verdicts) - len(failures)
    summary = f"{certified} of {len(verdicts)} members certified on {inputs} inputs"
    return Check("bit classes", summary, failures, tuple(map(str, verdicts)))
