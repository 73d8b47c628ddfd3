"""Embedding lookup on the CPU: a copy. Reads linear's panels, so tied weights are stored once."""

from __future__ import annotations

import torch

from isobatch.kernels.linear.weight import PANEL, PackedWeight


def embedding(token_ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Row token_ids[t] of the weight for each t."""
    return weight.panels[token_ids // PANEL, :, token_ids % PANEL]
