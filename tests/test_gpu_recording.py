"""A recording is not spoilt by what Python frees while it is made."""

from __future__ import annotations

import subprocess
import sys

import pytest

from isobatch.kernels.gpu.device import INTERPRETED

# In a process of its own: a recording that fails leaves the device's allocator in the midst of it.
_SCRIPT = """
import gc, sys
from contextlib import nullcontext
import torch
from isobatch.ops import cuda
from isobatch.ops.gpu import GpuOps

class Cycle:
    pass

if sys.argv[1] == "unguarded":
    cuda._nothing_freed = nullcontext
ops = GpuOps(torch.bfloat16, (4, 2, 64))
x = torch.ones(8, device="cuda")
held, calls = [ops.recorded(lambda: x + 1)], []

def work():
    calls.append(None)
    if len(calls) == 2:  # the first call warms up
        cycle = Cycle()  # young garbage, which the next collection finds
        cycle.itself, cycle.recording = cycle, held.pop()
        del cycle
    lists = [[] for _ in range(10_000)]  # enough for a collection, wherever one is allowed
    return x * 2

replay, result = ops.recorded(work)
x.fill_(3)
replay()
print(result.tolist())
"""


def _run(mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT, mode]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(INTERPRETED, reason="no GPU: nothing is recorded")
def test_garbage_that_holds_a_recording_does_not_spoil_the_next() -> None:
    ran = _run("guarded")
    assert (ran.returncode, ran.stdout) == (0, f"{[6.0] * 8}\n"), ran.stderr


@pytest.mark.skipif(INTERPRETED, reason="no GPU: nothing is recorded")
def test_control_garbage_collected_in_the_midst_of_a_recording_is_caught() -> None:
    ran = _run("unguarded")
    assert ran.returncode != 0
    assert "captur" in ran.stderr
