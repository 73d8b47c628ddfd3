"""The self test: does this machine give the bits that the fingerprint promises?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from isobatch.bits import bits_equal
from isobatch.kernels.bitclass import certify
from isobatch.kernels.catalogue import RECORDS
from isobatch.kernels.cpu.jit import max_threads
from isobatch.ops import certified_ops
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
    """

    name: str
    summary: str
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures


# (when it may be lost, x, factor, x * factor), x and the product as bits, since a thread that flushes cannot
# even convert them: 2^-140 * 2^20 reads a subnormal number, and 2^-126 / 2 writes one.
_SUBNORMALS = (
    ("read", 1 << 9, 2.0**20, 7 << 23),
    ("written", 1 << 23, 0.5, 1 << 22),
)


def check_subnormals() -> Check:
    """Whether subnormal numbers survive arithmetic, on this thread and on those that kernels run on.

    The golden digests would differ as well; this says why.
    """
    factor = torch.tensor([factor for _, _, factor, _ in _SUBNORMALS])
    x, expected = (
        torch.tensor([row[i] for row in _SUBNORMALS], dtype=torch.int32).view(torch.float32) for i in (1, 3)
    )
    # A rotation by no angle multiplies by its cosine; enough rows for every thread to get some.
    positions = torch.arange(len(_SUBNORMALS)).repeat(64 * max_threads())
    pairs = x[positions].reshape(-1, 1, 1).repeat(1, 1, 2)
    turned = certified_ops().rotary(pairs, positions, factor[:, None], torch.zeros(len(x), 1))
    places = {"the Python thread": (x * factor, expected)}
    places["the kernel threads"] = (turned, expected[positions].reshape(-1, 1, 1).repeat(1, 1, 2))
    failures = [
        f"{place}: subnormal numbers are taken for zero when {what}; undo torch.set_flush_denormal(True), or "
        "find the library, built with -ffast-math, that switched it on"
        for place, (got, want) in places.items()
        for i, (what, *_) in enumerate(_SUBNORMALS)
        if not bits_equal(got[i :: len(_SUBNORMALS)], want[i :: len(_SUBNORMALS)])
    ]
    return Check("IEEE subnormal numbers", "kept on every thread", tuple(failures))


def check_digests(progress: Progress) -> Check:
    """Whether the production members give the golden bits."""
    golden, computed = golden_digests(), computed_digests(progress)
    failures = [
        f"{name}: expected {golden.get(name, 'no such digest')}, got {computed.get(name, 'none')}"
        for name in sorted(golden.keys() | computed.keys())
        if golden.get(name) != computed.get(name)
    ]
    return Check("golden digests", f"{len(golden)} of {len(golden)} equal", tuple(failures))


def check_members(progress: Progress) -> Check:
    """Whether all members of each bit class still agree, bit by bit."""
    verdicts = []
    for record in RECORDS.values():
        for member in record.members:
            progress(f"{record.name}/{member.name}")
            verdicts.append(certify(record, member))
    inputs = sum(verdict.inputs for verdict in verdicts)
    failures = tuple(str(verdict) for verdict in verdicts if not verdict.member)
    return Check("bit classes", f"{len(verdicts)} members certified on {inputs} inputs", failures)
