"""Embedding as torch runs it."""

from __future__ import annotations

import torch

from isobatch.kernels.stock import DenseWeight


def embedding(token_ids: torch.Tensor, weight: DenseWeight) -> torch.Tensor:
    """torch.nn.functional.embedding."""
    return torch.nn.functional.embedding(token_ids, weight.dense)
