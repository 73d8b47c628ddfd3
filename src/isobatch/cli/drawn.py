"""Numbers for a GPU bench: many, soon there, and the same in each run."""

from __future__ import annotations

from functools import cache

import torch

from isobatch.kernels.data import floats
from isobatch.kernels.gpu.device import device, dtypes


def drawn(name: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Plain numbers on the device, the first million drawn, and repeated to size.

    Args:
        name: what they are; another name, other numbers.
        shape: of the tensor.
        scale: of the numbers.
    """
    count = torch.Size(shape).numel()
    some = _some(name, min(count, 1 << 20), scale)
    return some.repeat(-(-count // len(some)))[:count].view(shape)


@cache
def _some(name: str, count: int, scale: float) -> torch.Tensor:
    return (floats(f"bench/{name}", count, kind="plain") * scale).to(device(), dtypes()[0])
