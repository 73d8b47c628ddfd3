"""Kernels that are launched while the one before still runs, and wait where they need its results.

Between two kernels of a step the GPU would stand still for a microsecond or two: the last programs end, the
next ones are launched, and their first loads come back. Programmatic dependent launch (Hopper and later) lets
a kernel take its places as soon as all programs of the one before have said `next_may_begin`. What it does
before `inputs_ready` may touch only what no kernel of a step writes, such as weights.

Every kernel that is launched with `early()` calls `inputs_ready` before anything else that reads or writes.
Its end so says that all kernels before it have ended, too: memory may be given back and used again in the
order of launches, as ever. No sum is touched, and no bit.

One kernel, `attention/gluon_chain.py`, runs beside the one before it. It takes that one's results by counts,
reads besides only what is older than both, which that one has waited for before it let anyone begin, and
waits like all others before it writes.

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

    Small kernels, and the phases of decode, say so at once. Others that fill the GPU say so when their loads
    are done: a successor placed any sooner gets the places that happen to be free, and is spread unevenly for
    all its time.
    """
    if not _PLAIN and tl.target_info.cuda_capability_geq(9, 0):
        gdc_launch_dependents()
