"""Kernels that are launched while the one before still runs, and wait where they need its results.

Between two kernels of a step the GPU would stand still for a microsecond or two: the last programs end, the
next ones are launched, and their first loads come back. Programmatic dependent launch (Hopper and later) lets
a kernel take its places as soon as all programs of the one before have said `next_may_begin`. What it does
before `inputs_ready` may touch only what no kernel of a step writes, such as weights, and a step's tables.

Every kernel that is launched with `early()` calls `inputs_ready` before it reads or writes anything else, and
before it lets the next one begin. Its end so says that all kernels before it have ended, too: memory may be
given back and used again in the order of launches, as ever. No sum is touched, and no bit.

One kernel, `attention/gluon_chain.py`, runs beside the one before it. It takes that one's results by counts
(`release`, `acquired`) and waits like all others before it writes. What it reads besides is older than both,
and the one before has waited for that before it let anyone begin. So it is with a step's tables. That a wait
there is enough is our reading of the hardware; the guide promises it to those only that wait themselves.
`tests/test_gpu_overlap.py` tries it on a GPU.

Source: the CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from isobatch.kernels.gpu.device import INTERPRETED, architecture

_PLAIN = tl.constexpr(INTERPRETED)


@cache
def overlaps() -> bool:
    """Whether the architecture can launch a kernel early."""
    return not INTERPRETED and int(architecture().removeprefix("sm")) >= 90


def early() -> dict[str, bool]:
    """The launch option of a kernel that calls `inputs_ready`; empty where there is none."""
    return {"launch_pdl": True} if overlaps() else {}


@triton.jit
def inputs_ready():
    """Waits until all kernels before have ended, and what they wrote can be read."""
    if not _PLAIN and tl.target_info.cuda_capability_geq(9, 0):
        gdc_wait()


@triton.jit
def next_may_begin():
    """Lets the next kernel take its places, once every program has come here or has ended.

    Small kernels, the scores of decode, and products of few rows before a small kernel say so at once. Others
    that fill the GPU say so when their loads are done: a successor that fills it, too, gets the places that
    happen to be free if it comes any sooner, and is spread unevenly for all its time.
    """
    if not _PLAIN and tl.target_info.cuda_capability_geq(9, 0):
        gdc_launch_dependents()


@triton.jit
def looked_up(at, SETTLED: tl.constexpr):
    """An int32 or int64 of a step's tables. Where these are settled (`PagedRows`) it may be asked for before
    `inputs_ready`: the kernel before has waited for them before it let this one begin. In assembly, marked
    for `tests/compile_gpu_kernels.py`; and not by way of the read-only cache, for the assembler would move
    that behind the wait."""
    if _PLAIN or not SETTLED:
        return tl.load(at)
    LONG: tl.constexpr = at.dtype.element_ty == tl.int64
    return tl.inline_asm_elementwise(
        "ld.global.b64 $0, [$1]; // settled" if LONG else "ld.global.b32 $0, [$1]; // settled",
        "=l,l" if LONG else "=r,l", [at.to(tl.int64)], dtype=tl.int64 if LONG else tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def ask_ahead(at):
    """Asks the second-level cache for the lines at these addresses, of what no kernel of a step writes.

    Before `inputs_ready` it costs nothing. A norm's weights are few, but since the step before all of the
    model's have gone through that cache, and they would come from memory.
    """
    if not _PLAIN:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0",
            "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def ask_for(at, size):
    """As `ask_ahead`, for int32 `size` bytes from each of these addresses on; both are in whole sixteens.

    The machine asks for one of a warp's addresses after the other, and once for one that its threads share.
    So threads side by side had better share one.
    """
    if not _PLAIN:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
            "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def release(counter, apart, copies: tl.constexpr, amount):
    """Adds to int32 counters once all threads of the program are here: what they wrote is then to be read.

    In assembly, barrier and all: Triton does not pipeline a loop in which it sees a barrier.

    Args:
        counter: pointer to the first.
        apart: int32, bytes from one to the next.
        copies: how many, at most as many as the program has threads.
        amount: int32.
    """
    if _PLAIN:  # programs come one after the other
        at = counter + tl.arange(0, copies) * (apart // 4)
        tl.store(at, tl.load(at) + amount)
        return
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred mine;
            .reg .s32 thread;
            .reg .b64 at;
            mov.u32 thread, %tid.x;
            setp.lt.s32 mine, thread, $4;
            mul.wide.s32 at, thread, $2;
            add.s64 at, at, $1;
            bar.sync 0;
            @mine red.release.gpu.global.add.s32 [at], $3;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r,r", [counter.to(tl.int64), apart, amount, copies], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def acquired(counter):
    """An int32 that a running kernel counts up by `release`: what was written before can then be read."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];",
        "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
