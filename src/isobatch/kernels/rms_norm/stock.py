"""RMS norm as torch runs it, and in float64 for reference."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.nn.functional.rms_norm after the residual addition."""
    total = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps), total


def llama_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as transformers' LlamaRMSNorm rounds it: to x's dtype before the weight, and after."""
    total = x if residual is None else x + residual
    wide = total.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype), total


def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64."""
    return rms_norm(x.double(), weight.double(), eps, None if residual is None else residual.double())
