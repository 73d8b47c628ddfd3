"""Kernels that are launched early wait for the ones before: tried on a GPU, in graphs, many times over.

Elsewhere the code of every kernel is read for it (`tests/test_gpu_compile.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from isobatch.bits import bits_equal
from isobatch.kernels.activation.triton import silu_and_mul
from isobatch.kernels.data import floats
from isobatch.kernels.gpu.device import device
from isobatch.kernels.gpu.overlap import acquired, early, inputs_ready, looked_up, next_may_begin, overlaps
from isobatch.kernels.gpu.paired import PairedWeight
from isobatch.kernels.linear.members import tile_named
from isobatch.kernels.linear.triton import gated_tile, linear_tile
from isobatch.kernels.rms_norm.triton import rms_norm
from isobatch.kernels.stock import DenseWeight

pytestmark = pytest.mark.skipif(not overlaps(), reason="no GPU, or none that launches a kernel early")
_WIDTH, _LINKS, _REPLAYS = 1024, 40, 20
_MANY = "128x128x64.4.5tp1"
Step = Callable[[torch.Tensor], torch.Tensor]


@triton.jit
def _copy_kernel(x, y, COUNT: tl.constexpr, WAITS: tl.constexpr):
    if WAITS:
        inputs_ready()
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def _beside_kernel(x, y, count, COUNT: tl.constexpr, WAITS: tl.constexpr, HASTY: tl.constexpr):
    """Takes what the kernel before counts; WAITS: never, before it writes, or may end early, after a wait or
    without one."""
    if HASTY:
        next_may_begin()
    at = tl.arange(0, COUNT)
    if WAITS >= 2 and tl.load(x) < 0:
        if WAITS == 2:
            inputs_ready()
        return
    while acquired(count) == 0:
        pass
    read = tl.load(x + at)
    if WAITS > 0:
        inputs_ready()
    tl.store(y + at, read)


@triton.jit
def _look_kernel(table, y, COUNT: tl.constexpr, MARKED: tl.constexpr):
    """Copies int32 numbers that it looks up before it waits, as settled tables are, if they are MARKED so."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    seen = looked_up(table + at, MARKED)
    inputs_ready()
    tl.store(y + at, seen)


@triton.jit
def _between_kernel(x, y, COUNT: tl.constexpr, HASTY: tl.constexpr):
    """Lets the next one begin when it has waited itself, or at once."""
    if HASTY:
        next_may_begin()
    inputs_ready()
    if not HASTY:
        next_may_begin()
    at = tl.arange(0, COUNT)
    tl.store(y + at, tl.load(x + at))


def _copied(x: torch.Tensor, *, waits: bool) -> torch.Tensor:
    y = torch.empty_like(x)
    _copy_kernel[(x.numel() // 1024,)](x, y, COUNT=1024, WAITS=waits, **early())
    return y


@triton.jit
def _late_kernel(x, y, elements, COUNT: tl.constexpr, SPINS: tl.constexpr):
    """Copies, long after it has let the next kernel begin; so few programs that those find room."""
    inputs_ready()
    next_may_begin()
    spun = 0.0
    for _ in range(SPINS):
        spun = tl.math.sin(spun + 1.0)
    for begin in range(tl.program_id(0) * COUNT, elements, tl.num_programs(0) * COUNT):
        at = begin + tl.arange(0, COUNT)
        tl.store(y + at, tl.load(x + at), mask=spun < 2.0)


def _late(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _late_kernel[(64,)](x, y, x.numel(), COUNT=1024, SPINS=1000, **early())
    return y


# Few rows by ordinary copies and by bulk copies, in programs that stay; many.
TILES = (
    (1, "16x64x128.4.8w"),
    (16, "16x64x256.4.4wtp1"),
    (64, "64x64x128.4.6wtp1"),
    (300, _MANY),
    (4096, _MANY),
)


def _steps(tile_name: str) -> list[Step]:
    """One link of a chain: what a layer does, without attention."""
    tile = tile_named(tile_name)
    wide, narrow = (
        DenseWeight((floats(f"overlap/{n}", n, k, kind="plain") / k**0.5).to(device(), torch.bfloat16))
        for n, k in ((2 * _WIDTH, _WIDTH), (_WIDTH, _WIDTH))
    )
    scale = torch.ones(_WIDTH, dtype=torch.bfloat16, device=device())
    return [
        lambda x: rms_norm(x, scale, 1e-6)[0],
        lambda x: linear_tile(x, wide, tile=tile, small_next=True),
        silu_and_mul,
        lambda x: linear_tile(x, narrow, tile=tile, small_next=True),
        lambda x: rms_norm(x, scale, 1e-6)[0],
        lambda x: gated_tile(x, PairedWeight(wide), tile=tile),
        lambda x: linear_tile(x, narrow, tile=tile),
    ]


def _differs_in_a_graph(steps: list[Step], rows: int) -> bool:
    """Whether a recorded chain ever gives other bits than its kernels one by one, each awaited."""
    x = floats("overlap/x", rows, _WIDTH, kind="plain").to(device(), torch.bfloat16)

    def chain(wait: bool) -> torch.Tensor:
        y = x
        for step in steps * _LINKS:
            y = step(y)
            if wait:
                torch.cuda.synchronize()
        return y

    expected = chain(wait=True).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(wait=False)
    other = floats("overlap/other", rows, _WIDTH, kind="plain").to(device(), torch.bfloat16)
    for _ in range(_REPLAYS):
        # Between two runs of the same numbers one of others, so that what is stale is also wrong.
        kept = x.clone()
        x.copy_(other)
        graph.replay()
        x.copy_(kept)
        graph.replay()
        torch.cuda.synchronize()
        if not bits_equal(got, expected):
            return True
    return False


@pytest.mark.parametrize(("rows", "tile"), TILES)
def test_a_chain_in_a_graph_gives_the_bits_of_kernels_one_by_one(rows: int, tile: str) -> None:
    assert not _differs_in_a_graph(_steps(tile), rows)


@pytest.mark.parametrize(("rows", "tile"), TILES)
def test_control_a_kernel_that_does_not_wait_is_caught(rows: int, tile: str) -> None:
    def hasty(x: torch.Tensor) -> torch.Tensor:
        return _copied(x, waits=False)

    def patient(x: torch.Tensor) -> torch.Tensor:
        return _copied(x, waits=True)

    assert not _differs_in_a_graph([*_steps(tile), _late, patient], rows)
    assert _differs_in_a_graph([*_steps(tile), _late, hasty], rows)


def _what_is_looked_up_differs(*, hasty: bool) -> bool:
    """Whether a table that one kernel writes late, and another waits for, is ever stale to a third."""
    x = torch.zeros(64 * 1024, dtype=torch.int32, device=device())

    def looked() -> torch.Tensor:
        table, passed, y = torch.empty_like(x), torch.empty_like(x[:1024]), torch.empty_like(x)
        _late_kernel[(64,)](x, table, x.numel(), COUNT=1024, SPINS=1000, **early())
        _between_kernel[(1,)](x, passed, COUNT=1024, HASTY=hasty, **early())
        _look_kernel[(64,)](table, y, COUNT=1024, MARKED=True, **early())
        return y

    looked()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [looked() for _ in range(_LINKS)]
    for turn in range(1, _REPLAYS + 1):
        x.fill_(turn)  # so that what is stale is also wrong
        graph.replay()
        torch.cuda.synchronize()
        if any(not torch.equal(y, x) for y in found):
            return True
    return False


def test_what_a_kernel_wrote_for_which_another_waited_may_be_looked_up_before_ones_own_wait() -> None:
    assert not _what_is_looked_up_differs(hasty=False)


def test_control_tables_are_stale_where_nobody_waits_before_the_next_one_begins() -> None:
    assert _what_is_looked_up_differs(hasty=True)
