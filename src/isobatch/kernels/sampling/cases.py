"""The cases of sample and penalize, on the CPU; the GPU's records move them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isobatch.kernels.data import floats, integers
from isobatch.kernels.registry import RowCase
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows

Parameters = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p."""


def sample_case(name: str, rows: int, V: int, parameters: Sequence[Parameters], tied: int) -> RowCase:
    """Rows of logits, each with a tie.

    Args:
        name: the seed.
        rows: how many.
        V: tokens of the vocabulary.
        parameters: of each row.
        tied: the token whose logit is that of token 7.
    """
    logits = floats(f"{name}/logits", rows, V, kind="plain") * 4
    logits[:, 7] = logits[:, tied]
    heat, top_k, top_p, min_p = (list(column) for column in zip(*parameters, strict=True))
    per_row = {
        "logits": logits,
        "temperature": torch.tensor(heat),
        "top_k": torch.tensor(top_k),
        "top_p": torch.tensor(top_p),
        "min_p": torch.tensor(min_p),
        "seed": integers(f"{name}/seed", rows, 2**31) * -3,
        "position": integers(f"{name}/position", rows, 4096),
    }
    return RowCase(per_row, {}, group=("rows", SamplingRows))


def penalize_case(name: str, rows: int, V: int, tens: int) -> RowCase:
    """Rows of logits, and which tokens each has seen how often.

    Args:
        name: the seed.
        rows: how many.
        V: tokens of the vocabulary.
        tens: a row has seen eight of the ten tokens from one of so many multiples of ten on.
    """
    seen = torch.stack([torch.arange(10) + 10 * int(ten) for ten in integers(f"{name}/ids", rows, tens)])
    seen[:, 8:] = -1
    per_row = {
        "logits": floats(f"{name}/logits", rows, V),
        "ids": seen,
        "counts": integers(f"{name}/counts", rows * 10, 3).reshape(rows, 10),
        "repetition": torch.full((rows,), 1.3),
        "presence": torch.full((rows,), 0.4),
        "frequency": torch.full((rows,), 0.7),
    }
    return RowCase(per_row, {}, group=("rows", PenaltyRows))
