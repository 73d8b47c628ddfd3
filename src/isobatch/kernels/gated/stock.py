"""The first half of an MLP as torch runs it, and in float64 for reference."""

from __future__ import annotations

import torch

from isobatch.kernels.activation import stock as activation
from isobatch.kernels.gpu.paired import PairedWeight
from isobatch.kernels.linear import stock as linear


def gated(x: torch.Tensor, weight: PairedWeight) -> torch.Tensor:
    """torch's product, and torch's silu of its left half times the right."""
    return activation.silu_and_mul(linear.linear(x, weight.apart()))


def gated_ref(x: torch.Tensor, weight: PairedWeight) -> torch.Tensor:
    """The same in float64."""
    return activation.silu_and_mul(linear.linear_ref(x, weight.apart()))
