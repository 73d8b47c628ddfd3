"""The same bits on every CPU: golden digests here, and with the compiler told that this CPU is another."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from isobatch.bits import digest
from isobatch.engine.llm import LLM
from isobatch.engine.sampling_params import SamplingParams
from isobatch.kernels.catalogue import record
from isobatch.models.locate import demo_weights
from isobatch.ops.fingerprint import computed_digests, golden_digests, numerics_class

# Coded weights have no digests: certification holds them to the widened ones, which have.
_PRINT_DIGESTS = """
import json
from isobatch.kernels.bitclass import certify
from isobatch.kernels.catalogue import record
from isobatch.kernels.cpu.tile import LANES
from isobatch.ops.fingerprint import computed_digests
linear = record("linear")
verdict = certify(linear, linear.member("tiles"), (1, 2, 37))
print(json.dumps([LANES, computed_digests(), str(verdict)]))
"""
# (CPU, features, floats in a vector): with 256-bit vectors; and with neither vectors beyond SSE2 nor an fma
# instruction, where every step of a chain is a call of libm's fmaf.
_OTHER_CPUS = {"x86_64": [("haswell", "+avx2,+fma", 8), ("x86-64", "", 8)]}.get(platform.machine(), [])


def test_this_machine_gives_the_golden_bits() -> None:
    assert computed_digests() == golden_digests()


@pytest.mark.parametrize(("cpu", "features", "lanes"), _OTHER_CPUS)
def test_another_cpu_gives_the_golden_bits(cpu: str, features: str, lanes: int) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    ran = subprocess.run(
        [sys.executable, "-c", _PRINT_DIGESTS], env=environment, capture_output=True, text=True, check=True
    )
    used_lanes, digests, verdict = json.loads(ran.stdout)
    assert used_lanes == lanes
    assert verdict == f"linear/tiles: member, equal on {3 * len(record('linear').variants)} inputs"
    assert digests == golden_digests()


# SHA-256 over the digests of all logits of SmolLM2 on _GOLDEN_TEXT and eight tokens after it.
_GOLDEN_LOGITS = "c99fefdb1132eab63876900a397d8359c30ee886fb69d68d2d567a0d911a3fc4"
_GOLDEN_TEXT = "Bits are bits: the same on every machine, at every load, in every year."


@pytest.mark.weights
def test_smollm2_gives_the_golden_logits() -> None:
    llm = LLM(demo_weights(), kv_cache_bytes=16 << 20, progress=False)
    sha = hashlib.sha256()

    def watch(op: str, _arguments: Mapping[str, Any], result: Any) -> None:
        if op == "logits":
            sha.update(digest(result).encode())

    with llm.engine.decoder.ops.observed(watch):
        llm.generate(_GOLDEN_TEXT, SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0))
    assert sha.hexdigest() == _GOLDEN_LOGITS


def test_fingerprint_follows_the_golden_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    before = numerics_class()
    changed = {**golden_digests(), "linear/wide": "0" * 64}
    monkeypatch.setattr("isobatch.ops.fingerprint.golden_digests", lambda: changed)
    numerics_class.cache_clear()
    try:
        assert numerics_class() != before
    finally:
        monkeypatch.undo()
        numerics_class.cache_clear()
    assert numerics_class() == before
