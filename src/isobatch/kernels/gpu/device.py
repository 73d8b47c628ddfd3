"""Where the GPU kernels run: on the GPU, or, under Triton's interpreter, on the CPU from the same source.

The interpreter checks a kernel's logic where no GPU is to be had. Its bits are its own (NumPy sums a dot
product in another order than a tensor core), so members are certified within one or the other, never across.
"""

from __future__ import annotations

from functools import cache

import torch
import triton

from isobatch.errors import UnsupportedOpError

INTERPRETED: bool = triton.knobs.runtime.interpret
_LEAST_CAPABILITY = (8, 0)


@cache
def device() -> torch.device:
    """The device of every tensor that a GPU kernel gets.

    Raises:
        UnsupportedOpError: no GPU, or one without bfloat16 tensor cores.
    """
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedOpError(
            "no GPU is to be had", expected="an NVIDIA GPU", fix="see nvidia-smi; models also run on the CPU"
        )
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        raise UnsupportedOpError(
            f"{torch.cuda.get_device_name()} is too old",
            expected="compute capability 8.0 or more",
            got=".".join(map(str, capability)),
            fix='use device="cpu"',
        )
    return torch.device("cuda", torch.cuda.current_device())


@cache
def architecture() -> str:
    """The architecture family that the numerics class and the plans are for, such as "sm90"."""
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device())
    return f"sm{major}{minor}"


@cache
def multiprocessors() -> int:
    """Streaming multiprocessors of the device; 4 under the interpreter, so that persistent loops turn."""
    return 4 if INTERPRETED else int(torch.cuda.get_device_properties(device()).multi_processor_count)


@cache
def gluon_runs() -> bool:
    """Whether kernels in Gluon run: they are for Hopper, and Triton's interpreter does not know them."""
    return architecture() == "sm90"


def capturing() -> bool:
    """Whether the current stream records a graph, so that nothing may wait for a result."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


def dtypes() -> tuple[torch.dtype, ...]:
    """The storage dtypes of GPU kernels; the interpreter's bfloat16 is not trustworthy."""
    return (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)
