"""Rotary embedding as torch runs it, and in float64 for reference."""

from __future__ import annotations

import torch


def rotary(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin."""
    c, s = cos[positions].repeat(1, 2)[:, None], sin[positions].repeat(1, 2)[:, None]
    left, right = x.chunk(2, -1)
    return x * c + torch.cat((-right, left), -1) * s


def rotary_in_dtype(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The same with the angles in x's dtype, as transformers passes them on."""
    return rotary(x, positions, cos.to(x.dtype), sin.to(x.dtype))


def rotary_ref(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The same in float64."""
    return rotary(x.double(), positions, cos.double(), sin.double())
