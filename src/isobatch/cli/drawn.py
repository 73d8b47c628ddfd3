"""Numbers for a GPU bench: many, soon there, and the same in each run."""

from __future__ import annotations

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
    some = floats(f"bench/{name}", min(count, 1 << 20), kind="plain") * scale
    return some.to(device(), dtypes()[0]).repeat(-(-count // len(some)))[:count].view(shape)
