"""silu_and_mul as torch runs it, and in float64 for reference."""

from __future__ import annotations

import torch


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.silu of the left half times the right."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def silu_and_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in float64."""
    return silu_and_mul(gate_up.double())
