"""Embedding lookup on the CPU: a copy, each number widened by itself where the weight is coded.

Reads linear's panels, so tied weights are stored once.
"""

from __future__ import annotations

import torch

from isobatch.kernels.linear.weight import PackedWeight


def embedding(token_ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Row token_ids[t] of the weight for each t."""
    return weight.rows(token_ids).floats()
