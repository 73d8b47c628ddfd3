"""What the process around us may do: modes of threads, torch's defaults, fork, a compiler switched off."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch

import isobatch.kernels.linear.cpu
import isobatch.kernels.linear.weight
from isobatch.cli import checks
from isobatch.engine.engine import Engine
from isobatch.errors import FloatEnvironmentError
from isobatch.models.loading import load_decoder
from isobatch.ops import certified_ops
from isobatch.ops.environment import deviations
from tests.engine_harness import TinyCheckpoint, World, drive, expect_same, fixed_asks, tiny_world

ASKS = fixed_asks()
# glibc's numbers for x86-64.
MODES = {"down": 0x400, "up": 0x800, "towards zero": 0xC00}
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the modes have other numbers elsewhere")


@contextmanager
def rounding(mode: int) -> Iterator[None]:
    libm = ctypes.CDLL("libm.so.6")
    libm.fesetround(mode)
    try:
        yield
    finally:
        libm.fesetround(0)


@contextmanager
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# Modes.


@x86_64
@pytest.mark.parametrize("mode", MODES)
def test_process_that_rounds_another_way_is_refused(mode: str) -> None:
    with rounding(MODES[mode]):
        failures = checks.check_arithmetic().failures
        with pytest.raises(FloatEnvironmentError, match="not rounded to the nearest"):
            certified_ops()
    assert any(failure.startswith("the Python thread: ") for failure in failures)
    assert all("not rounded to the nearest number; undo fesetround" in failure for failure in failures)
    assert checks.check_arithmetic().ok
    certified_ops()


@x86_64
def test_kernel_threads_that_round_another_way_are_found() -> None:
    """A thread passes its modes on to those that it starts, and keeps none itself when it puts them back."""
    script = (
        "import ctypes, torch; from isobatch.ops.environment import deviations\n"
        "from isobatch.kernels.rms_norm.cpu import rms_norm\n"
        "libm = ctypes.CDLL('libm.so.6'); libm.fesetround(0x800)\n"
        "rms_norm(torch.ones(99, 99), torch.ones(99), 0.1); libm.fesetround(0)\n"
        "print(*deviations(), sep='\\n')"
    )
    environment = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()
    assert all(line.startswith("the kernel threads: ") for line in done.stdout.splitlines())


@x86_64
@pytest.mark.parametrize("mode", [*MODES, "flush"])
def test_mode_switched_on_later_is_refused_not_served(mode: str) -> None:
    """By the thread that has it; what is in flight is served as ever when it is switched off."""
    engine = tiny_world().engine(max_batch_tokens=64)
    want = drive(tiny_world().engine(), ASKS)
    ids = [engine.add(ask.prompt, ask.params) for ask in ASKS]
    replies: dict[int, Any] = {}
    engine.step(replies)
    with flushing() if mode == "flush" else rounding(MODES[mode]), pytest.raises(FloatEnvironmentError):
        engine.step(replies)
    while engine.has_work:
        engine.step(replies)
    for number, expected in zip(ids, want, strict=True):
        assert expected is not None
        expect_same(replies[number], expected, f"after {mode}")


def test_mode_of_another_thread_is_its_own_affair() -> None:
    caught: list[BaseException] = []

    def other() -> None:
        try:
            with flushing():
                drive(tiny_world().engine(), ASKS[:1])
        except FloatEnvironmentError as error:
            caught.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert deviations() == ()


# torch's defaults.


class _ExplicitTorch:
    """torch, with what the folder of linear leaves to the defaults filled in."""

    empty = staticmethod(partial(torch.empty, dtype=torch.float32, device="cpu"))
    zeros = staticmethod(partial(torch.zeros, dtype=torch.float32, device="cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "default",
    [
        lambda: _default_dtype(torch.float64),
        lambda: _default_dtype(torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)
def test_torchs_defaults_do_not_matter(default: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when a model is loaded nor when it is run."""
    explicit = _ExplicitTorch()
    monkeypatch.setattr(isobatch.kernels.linear.cpu, "torch", explicit)
    monkeypatch.setattr(isobatch.kernels.linear.weight, "torch", explicit)
    want = drive(tiny_world().engine(), ASKS)

    def loaded() -> Engine:
        checkpoint = TinyCheckpoint()
        return World(load_decoder(checkpoint, certified_ops()), fill=None).engine()

    for loading, running in ((default, nullcontext), (nullcontext, default), (default, default)):
        with loading():
            engine = loaded()
        with running():
            got = drive(engine, ASKS)
        for reply, expected in zip(got, want, strict=True):
            assert expected is not None
            expect_same(reply, expected, "under another default")


# Processes.

_FORK = """
import os, sys
from isobatch.errors import IsobatchError
from tests.engine_harness import answer, tiny_world, fixed_asks
{before}
sys.stdout.flush()
if os.fork() == 0:
    try:
        print(answer())
    except IsobatchError as error:
        print(type(error).__name__)
    sys.stdout.flush()
    os._exit(0)
print(os.wait()[1])
"""


def test_child_forked_after_a_kernel_is_refused() -> None:
    """OpenMP would end it with a signal."""
    command = [sys.executable, "-c", _FORK.format(before="answer()")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ForkedProcessError", "0"]


def test_switched_off_compiler_is_refused() -> None:
    words = ["-m", "isobatch", "generate", "demo", "hi", "--json"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["type"] == "ConfigError"
    assert "unset NUMBA_DISABLE_JIT" in error["message"]
    assert done.returncode == 2


# Memory.

_EVERY_MEMBER_AGAIN_AND_AGAIN = """
import sys
from isobatch.bits import digest
from isobatch.kernels.catalogue import RECORDS

for record in RECORDS.values():
    for variant in record.variants:
        case = record.draw(f"memory/{record.name}/{variant}", 37, variant)
        for member in record.members:
            if len({digest(*case.call(member)) for _ in range(20)}) > 1:
                sys.exit(f"{record.name}/{variant}: {member.name} reads memory that is no longer its own")
"""


def test_kernel_keeps_the_memory_that_it_works_in() -> None:
    """With one allocator for all threads, what a kernel gives back too early is at once another thread's."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "NUMBA_NUM_THREADS": "3"}
    command = [sys.executable, "-c", _EVERY_MEMBER_AGAIN_AND_AGAIN]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
