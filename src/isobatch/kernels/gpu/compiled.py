"""torch's compiler, for torch's own side of a comparison: without it PyTorch would not be at its best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from isobatch.kernels.gpu.device import INTERPRETED

_Function = TypeVar("_Function", bound=Callable[..., Any])
# torch gives up on a function after eight kinds of arguments. A batch's sizes are more, and a model's layers.
_MOST_KINDS = 256


def compiled(function: _Function, *, each_size: bool = False) -> _Function:
    """The function as torch.compile makes it, when first called; as it is under the interpreter.

    Args:
        function: of tensors, compiled whole or not at all.
        each_size: whether every size is compiled by itself. Otherwise sizes that change are left open.
    """
    if INTERPRETED:
        return function
    made = torch.compile(function, fullgraph=True, dynamic=False if each_size else None)

    def run(*arguments: Any, **named: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MOST_KINDS):
            return made(*arguments, **named)

    return run  # type: ignore[return-value]
