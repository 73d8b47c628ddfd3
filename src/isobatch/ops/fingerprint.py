"""The fingerprint of a numerics class: equal fingerprints promise equal bits.

It is derived from golden digests, the bits that every op gives on fixed inputs. They ship with the package,
so the fingerprint changes when a bit of an op does; and any machine can compute them again, which is how it
knows that it belongs to the class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files

from isobatch.bits import digest
from isobatch.kernels.catalogue import RECORDS
from isobatch.kernels.registry import OpRecord

NUMERICS_VERSION = 1
"""Raised with every change that moves a bit; the CHANGELOG says why."""

ARCHITECTURE = "cpu-ieee754"
DTYPE = "float32"


@cache
def golden_digests() -> dict[str, str]:
    """The digests that ship with the package, by "op/variant"."""
    text = files("isobatch.ops").joinpath("golden.json").read_text()
    return dict(json.loads(text))


def computed_digests(
    progress: Callable[[str], None] = lambda _name: None,
    records: Mapping[str, OpRecord] = RECORDS,
) -> dict[str, str]:
    """The same digests, computed on this machine by the production members.

    Variants whose weight is coded have none: a coded weight has no bits of its own to pin down, only those of
    the widened one, to which certification holds it on each machine (`OpRecord.coded`).

    Args:
        progress: told each name before it is computed.
        records: whose.
    """
    computed = {}
    for record in records.values():
        for variant in record.variants:
            if variant in record.coded:
                continue
            name = f"{record.name}/{variant}"
            progress(name)
            case = record.draw(f"golden/{name}", 37, variant)
            computed[name] = digest(*case.call(record.member(record.production)))
    return computed


@cache
def fingerprint() -> str:
    """Names the numerics class: architecture family, dtype, written orders, version.

    Returns:
        "iso-" and 16 hexadecimal digits.
    """
    return fingerprint_of(ARCHITECTURE, DTYPE, golden_digests())


def fingerprint_of(architecture: str, dtype: str, digests: Mapping[str, str]) -> str:
    """Names the numerics class of an architecture family and a dtype in which ops give these bits.

    Args:
        architecture: such as "cpu-ieee754" or "sm90".
        dtype: of weights and activations.
        digests: by "op/variant".
    """
    content = {
        "architecture": architecture,
        "dtype": dtype,
        "numerics_version": NUMERICS_VERSION,
        "golden": dict(digests),
    }
    return "iso-" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
