"""What one forward pass is given: every field set at construction, nothing from a global context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isobatch.kernels.layout import PagedRows


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of R requests, packed end to end.

    Args:
        token_ids: int64 [T].
        positions: int64 [T], each token's place in its own request, from 0.
        rows: whose tokens these are, and where their keys and values lie.
        logit_rows: int64 [S], the tokens whose next-token logits are wanted; None for all of them.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: PagedRows
    logit_rows: torch.Tensor | None
