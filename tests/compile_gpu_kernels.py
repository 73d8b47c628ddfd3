"""Compiles every member of every GPU record for Hopper, on a machine that need not have a GPU.

The interpreter runs a kernel's logic as Python; it says nothing about what the compiler refuses, or about a
tile that wants more shared memory than there is. A kernel that is launched early must wait before it touches
memory other than settled tables, or writes it if it runs beside the one before: that is seen in its code.
Prints a line per member; the exit code is 1 if any fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from isobatch.kernels.gpu import device as gpu
from tests.ptx_flow import reached_without

_TOUCHES = re.compile(r"\b(?:ld\.global|st\.global|ld\.relaxed|atom|red\.|cp\.async(?!\.bulk\.prefetch))")
_WRITES = re.compile(r"\b(?:st\.global|atom|red\.)")
_LETS = re.compile(r"\bgriddepcontrol\.launch_dependents")
_ENDS = re.compile(r"\s*(?:ret|exit)\s*;")
_SETTLED = re.compile(r"^.*// settled$", re.MULTILINE)
_SHARED_BYTES = 232_448  # what one program may have on compute capability 9.0


class _Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def _compile_only() -> list[Any]:
    """From here on a launch compiles and does nothing else; returns the list that compiled kernels go to."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **settings)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_
    driver.set_active(_Hopper())
    facts = {
        "device": torch.device("cpu"),
        "architecture": "sm90",
        "multiprocessors": 132,
        "capturing": False,
    }
    for name, fact in facts.items():
        setattr(gpu, name, lambda fact=fact: fact)
    return compiled


def touches_too_early(ptx: str) -> bool:
    """Whether a kernel that is launched early reads or writes memory before it waits, on some path.

    Asking the second-level cache for weights, which no kernel writes, is neither. A kernel that runs beside
    the one before acquires what that one counts, and may not write. What is marked as settled may be looked
    up at any time. Nobody may let the next one begin before it has waited itself, for what is older than both
    that one takes to be there; nor end, unless others of its warps wait, for its end says the same.
    """
    touches = _WRITES if "ld.acquire.gpu" in ptx else _TOUCHES
    groups = "brx.idx" in ptx  # some of which may be idle
    early = reached_without(_SETTLED.sub("", ptx), "griddepcontrol.wait")
    return any(
        touches.search(line) or _LETS.search(line) or (not groups and _ENDS.match(line)) for line in early
    )


def _hasty(compiled: list[Any], where: str) -> Iterator[str]:
    for kernel in compiled:
        if kernel.metadata.launch_pdl and touches_too_early(kernel.asm["ptx"]):
            yield f"{where}: {kernel.metadata.name} does not wait before it touches memory"


def failures() -> Iterator[str]:
    """A sentence for each member that cannot be compiled, or could not be launched."""
    compiled = _compile_only()
    from isobatch.kernels.gpu.catalogue import GPU_RECORDS
    from isobatch.kernels.gpu.random_weights import random_weights
    from isobatch.kernels.gpu.tokens import fill_in

    random_weights(2**62, 0, 4096, torch.bfloat16)
    compiled.clear()
    tokens = torch.zeros(3, dtype=torch.int64)
    fill_in(tokens, tokens.int(), tokens, tokens)
    yield from _hasty(compiled, "a step's tokens")
    if not compiled[0].metadata.launch_pdl:
        yield "a step's tokens: not gathered by a kernel that is launched early"
    for record in GPU_RECORDS.values():
        # float16 makes the same programs with another type.
        variants = [variant for variant in record.variants if not variant.endswith("fp16")]
        for member in record.members:
            for variant in variants if member.name == record.production else variants[:1]:
                compiled.clear()
                where = f"{record.name}/{member.name} at {variant}"
                try:
                    record.draw("compile", 37, variant).call(member)
                except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
                    cause = error.__cause__ or error
                    yield f"{where}: {type(cause).__name__}: {str(cause)[-300:]}"
                    continue
                if not compiled:
                    continue  # a kernel of the CPU, canonical for what must be the same on both
                shared = max(kernel.metadata.shared for kernel in compiled)
                print(f"{where}: {len(compiled)} kernels, at most {shared} bytes shared")
                if shared > _SHARED_BYTES:
                    yield f"{where}: {shared} bytes of shared memory"
                yield from _hasty(compiled, where)


if __name__ == "__main__":
    found = list(failures())
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
