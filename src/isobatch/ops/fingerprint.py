"""Names for what replies depend on: the numerics class, and with the model the fingerprint.

A numerics class is named after golden digests, the bits that every op gives on fixed inputs. They ship with
the package, so the name changes when a bit of an op does; and any machine can compute them again, which is
how it knows that it belongs to the class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from isobatch._version import __version__
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
def numerics_class() -> str:
    """Names the numerics class of the CPU: architecture family, dtype, written orders, version.

    Returns:
        "num-" and 16 hexadecimal digits.
    """
    return numerics_class_of(ARCHITECTURE, DTYPE, golden_digests())


def numerics_class_of(architecture: str, dtype: str, digests: Mapping[str, str]) -> str:
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
    return "num-" + _short_digest(content)


NO_TOKENIZER = "0" * 64
"""Stands for the digest where a model has no tokenizer."""


@dataclass(frozen=True, slots=True)
class Identity:
    """All that a reply depends on besides its request: equal ones promise equal replies to equal requests.

    Args:
        numerics: the name of the numerics class.
        weights: the digest of weights and configuration, 64 hexadecimal digits.
        tokenizer: the digest of tokenizer and chat template, 64 hexadecimal digits, or NO_TOKENIZER.
        version: of isobatch, whose code is what lies between the ops.
    """

    numerics: str
    weights: str
    tokenizer: str
    version: str = __version__

    @property
    def fingerprint(self) -> str:
        """The whole in short: "iso-" and 16 hexadecimal digits."""
        return "iso-" + _short_digest(asdict(self))


def _short_digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
