"""How ops are called: the table of the functions that serve them, and observers that see each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from isobatch.kernels.layout import Layout, Weight
from isobatch.ops import check
from isobatch.ops.memory import CPU_DEVICE, Memory

Observer = Callable[[str, Mapping[str, Any], Any], None]
"""Called after each op with its name, its arguments by name and its result. It must change none of them."""


class Calls(Memory):
    """What ops are called through.

    Args:
        name: "isobatch" or "stock".
        table: the function of each op.
        layout: how those functions want weights and caches.
        dtype: of weights and activations.
        device: of all tensors.
    """

    def __init__(
        self,
        name: str,
        table: Mapping[str, Callable[..., Any]],
        layout: Layout,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU_DEVICE,
    ) -> None:
        super().__init__(layout, dtype, device)
        self.name = name
        self._check = check.Check(dtype, device.type)
        self._table = dict(table)
        self._observers: list[Observer] = []

    def prepare(self, weights: Iterable[tuple[Weight, bool]], rows: int, *, logits: bool = False) -> None:
        """Certifies now what would be certified when first used, where kernels are certified on each machine.

        Args:
            weights: of products to come, and whether each has a bias.
            rows: no product will have more, to speak of.
            logits: whether these products are `logits`.
        """

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Shows every call to `observer` inside the block."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    @property
    def watched(self) -> bool:
        """Whether anyone observes."""
        return bool(self._observers)

    def _run(self, op: str, **arguments: Any) -> Any:
        result = self._table[op](**arguments)
        for observer in self._observers:
            observer(op, arguments, result)
        return result
