"""Where the cases of GPU records get their tensors: drawn as for the CPU, rounded to a dtype, moved."""

from __future__ import annotations

import torch

from isobatch.kernels.gpu.device import device, dtypes

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_LONG = {short: dtype for dtype, short in SHORT.items()}


def case_variants(*kinds: str) -> tuple[str, ...]:
    """Each kind of data in each storage dtype, as "wide/bf16"."""
    return tuple(f"{kind}/{SHORT[dtype]}" for kind in kinds for dtype in dtypes())


def split_variant(variant: str) -> tuple[str, torch.dtype]:
    """The kind and the dtype of a variant."""
    kind, _, short = variant.rpartition("/")
    return kind, _LONG[short]


def to_device(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """On the device of the GPU kernels, in a dtype if one is given."""
    return tensor.to(device(), dtype)
