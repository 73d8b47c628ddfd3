"""Linear as torch runs it, and in float64 for reference."""

from __future__ import annotations

import torch

from isobatch.kernels.stock import DenseWeight


def linear(x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear: its library picks the order of summation by the number of rows."""
    return torch.nn.functional.linear(x, weight.dense, bias)


def logits(x: torch.Tensor, weight: DenseWeight) -> torch.Tensor:
    """The output projection in float32: the product's own accumulators where the library hands them out."""
    if x.is_cuda:
        return torch.mm(x, weight.dense.t(), out_dtype=torch.float32)
    return linear(x, weight).float()


def linear_ref(x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in float64."""
    return torch.nn.functional.linear(
        x.double(), weight.dense.double(), None if bias is None else bias.double()
    )
