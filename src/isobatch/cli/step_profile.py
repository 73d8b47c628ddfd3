"""Where the time of one decode step goes: the engine's own steps, seen by the GPU's tracer.

Kernels are launched while the one before still runs (docs/adr/0022-kernels-launched-early.md), and wait
there. So how long a kernel says it took includes the end of the one before, and the sum over all is more than
the step. Here a kernel is given the time between the latest end before its own and its own end; of that, what
no kernel was running in is idle: the host was late, or the GPU was between two launches. These add up to the
step, to the last microsecond.

A step is what lies between the ends of two embedding kernels, of which each step has one. The tracer slows
the host down a little, so the report also has the time of steps without it.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from isobatch.engine.engine import Engine
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import UnsupportedOpError

LINEAR, OUTPUT, SAMPLING, EXPERTS = "linear", "output projection", "sampling", "experts"
OTHER, IDLE = "copies and other kernels", "idle"
KERNELS: dict[str, tuple[str, ...]] = {
    LINEAR: ("_linear_", "nvjet", "cutlass", "sm90_xmma_gemm", "ampere_bf16", "ampere_fp16"),
    "attention": (
        "_decode_kernel",
        "_attention_kernel",
        "_scores_kernel",
        "_weights_kernel",
        "_chain_kernel",
    ),
    "norms": ("_rms_norm_kernel",),
    "qk-norm, rotary, write": ("_qk_norm_rotary_write_kernel", "_rotary_kernel", "_write_kv_kernel"),
    "activation": ("_silu_and_mul_kernel",),
    EXPERTS: ("_router_kernel", "_place_kernel", "_gate_up_kernel", "_down_kernel", "_combine_kernel"),
    OUTPUT: (),
    SAMPLING: ("_scan_kernel", "_bound_kernel", "_noise_kernel"),
    OTHER: (),
    IDLE: (),
}
"""Kinds of work, and how the names of their kernels begin: ours, and those of libraries. What is nowhere here
is OTHER. The output projection is the linear work right before sampling."""
# Both the router and the sampler end in a kernel of this name.
_CHOOSE = "_choose_kernel"
_MARK = "_embedding_kernel"

# Between these a step of 1,000 has 256 tokens of context in the mean, for the first sequences are that far
# ahead of the last; and a step of one none beyond 256, where another recording begins.
_PROMPT, _MOST = 224, 80
_WARM, _STEPS, _LOST = 4, 8, 3
_NAME = 60


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel or a copy on the GPU, from its start to its end, in microseconds."""

    name: str
    start: float
    end: float


def profile(engine: Engine, batch: int) -> dict[str, Any]:
    """Profiles decode steps of an engine.

    Args:
        engine: without work.
        batch: how many sequences.

    Returns:
        batch; contexts, least and most; steps; microseconds of a step as traced and as it is without; and
        `kinds` as `attributed` gives them.

    Raises:
        UnsupportedOpError: so many do not fit in the KV cache at once, or the tracer sees nothing.
    """
    blocks = batch * -(-(_PROMPT + _MOST) // engine.pool.block_size)
    if blocks > engine.pool.num_blocks:
        raise UnsupportedOpError("the KV cache is too small", expected=blocks, got=engine.pool.num_blocks)
    draw, vocabulary = random.Random(f"profile {batch}"), engine.decoder.config.vocab_size
    params = SamplingParams(temperature=0, max_tokens=_MOST, ignore_eos=True)
    numbers = [engine.add([draw.randrange(vocabulary) for _ in range(_PROMPT)], params) for _ in range(batch)]
    sequences = [engine.transcripts(number)[0].sequence for number in numbers]
    while not all(sequence.output_ids for sequence in sequences):
        engine.step()
    for _ in range(_WARM):  # in the first of these, a graph is recorded
        engine.step()
    started = time.perf_counter()
    for _ in range(_STEPS):
        engine.step()
    plain = (time.perf_counter() - started) / _STEPS * 1e6
    least = min(map(len, sequences))
    traced = launches(engine.step, _STEPS + _LOST)
    most = max(map(len, sequences))
    for number in numbers:
        engine.abort(number)
    engine.step()  # sees what the last one came to
    kinds = attributed(traced, _STEPS)
    return {
        "batch": batch,
        "contexts": [least, most],
        "steps": _STEPS,
        "us": sum(kind["us"] for kind in kinds),
        "untraced_us": plain,
        "kinds": kinds,
    }


def launches(work: Callable[[], object], times: int) -> list[Launch]:
    """What the GPU did while work was called.

    Args:
        work: queues something.
        times: how often it is called.
    """
    for calls in (1, times):  # the tracer's first start takes long
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(calls):
                work()
            torch.cuda.synchronize()
    return [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]


def attributed(traced: Iterable[Launch], steps: int) -> list[dict[str, Any]]:
    """The time of the last whole steps, given to kinds of work as the module says.

    Args:
        traced: of more steps than are asked for, in any order.
        steps: how many.

    Returns:
        For each kind in order: its name, microseconds and launches in a step, its share of it, and the
        microseconds of each kernel. Kinds that do not occur are left out.

    Raises:
        UnsupportedOpError: there are not so many steps.
    """
    begun = sorted(traced, key=lambda launch: launch.start)
    done = sorted(zip(begun, _kinds(begun), strict=True), key=lambda pair: pair[0].end)
    marks = [i for i, (launch, _) in enumerate(done) if launch.name.startswith(_MARK)]
    if len(marks) <= steps:
        raise UnsupportedOpError(
            "the tracer did not see every step",
            expected=f"more than {steps} of {_MARK}",
            got=f"{len(marks)} among {len(done)} kernels and copies",
            fix="let torch.profiler see kernels: CUPTI must be allowed, and no other tracer may run",
        )
    # The earliest start of what ends at a launch's end or later: from there on something was running.
    begins = list(accumulate((launch.start for launch, _ in reversed(done)), min))[::-1]
    times: dict[str, defaultdict[str, float]] = {kind: defaultdict(float) for kind in KERNELS}
    counts = Counter[str]()
    for i in range(marks[-steps - 1] + 1, marks[-1] + 1):
        (launch, kind), before = done[i], done[i - 1][0].end
        running = min(max(begins[i], before), launch.end)
        times[kind][launch.name[:_NAME]] += launch.end - running
        times[IDLE]["none"] += running - before
        counts[kind] += 1
    sums = {kind: sum(of.values()) for kind, of in times.items() if of}
    total = sum(sums.values())
    return [
        {
            "kind": kind,
            "us": took / steps,
            "share": took / total,
            "launches": counts[kind] / steps,
            "kernels": {name: us / steps for name, us in sorted(times[kind].items()) if kind != IDLE},
        }
        for kind, took in sums.items()
    ]


def _kinds(begun: Sequence[Launch]) -> list[str]:
    """The kind of each launch, in the order of their starts."""
    kinds: list[str] = []
    products: list[int] = []  # since the last launch of another kind, copies apart
    last = OTHER
    for i, launch in enumerate(begun):
        kind = next((kind for kind, names in KERNELS.items() if launch.name.startswith(names)), OTHER)
        if launch.name.startswith(_CHOOSE):
            kind = EXPERTS if last == EXPERTS else SAMPLING
        kinds.append(kind)
        if kind == LINEAR:
            products.append(i)
        elif kind != OTHER:
            for product in products if kind == SAMPLING else ():
                kinds[product] = OUTPUT
            products = []
        if kind != OTHER:
            last = kind
    return kinds
