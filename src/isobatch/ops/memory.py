"""Where the tensors of an `Ops` lie: device, dtype and layout, and how they get there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from isobatch.errors import ShapeError
from isobatch.kernels.coding import Coding
from isobatch.kernels.layout import PAGE, Cache, Layout, PagedRows, Stack, Weight

CPU_DEVICE = torch.device("cpu")


class Memory:
    """The memory that kernels of one device and dtype read.

    Args:
        layout: how weights and caches lie.
        dtype: of weights and activations.
        device: of all tensors.

    Attributes:
        page: tokens in a block of the KV cache.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._layout = layout
        self.page = layout.page

    def weight(self, outputs: int, inputs: int, coding: Coding) -> Weight:
        """An empty weight [outputs, inputs] in the layout of these kernels, to be filled by `put`.

        Stock kernels have it widened; ours keep it in its coding, which changes no bit.
        """
        return self._layout.weight.empty(outputs, inputs, coding)

    def gate_up(self, outputs: int, inputs: int, coding: Coding) -> Weight:
        """The same of an MLP's gates above its ups, for `gated`, which may want their rows elsewhere."""
        return (self._layout.gate_up or self._layout.weight).empty(outputs, inputs, coding)

    def stack(self, outputs: int, inputs: int, codings: Sequence[Coding]) -> Stack:
        """Empty matrices [outputs, inputs] of a layer's experts, one for each coding, likewise.

        Raises:
            UnsupportedOpError: no kernel for experts of these widths.
        """
        return self._layout.stack.empty(outputs, inputs, codings)

    def parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """A vector of a checkpoint, such as a norm's weight or a bias, as these kernels want it."""
        return tensor.to(self.device, self.dtype)

    def tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Plain numbers on the device of these kernels, whatever torch's defaults have been set to."""
        if self.device.type == "cpu":
            return torch.tensor(values, dtype=dtype, device="cpu")
        # From pageable memory the copy would wait for all that is queued.
        made = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
        return made.to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begins to read a tensor.

        Args:
            tensor: of these kernels; it may be overwritten by work that is queued from now on.

        Returns:
            What waits for it, and for nothing that is queued later; on the CPU.
        """
        return lambda: tensor

    def paged_rows(
        self, starts: list[int], lengths: list[int], tables: list[list[int]], slots: list[int]
    ) -> PagedRows:
        """Whose query rows a step has, from plain integers; see `PagedRows`."""
        return PagedRows(
            self.tensor(starts, torch.int32),
            self.tensor(lengths, torch.int32),
            self.tensor(tables, torch.int32),
            self.tensor(slots),
        )

    def kv_cache(self, blocks: int, kv_heads: int, head_size: int) -> Cache:
        """An empty cache for one layer, of blocks of `page` tokens.

        Raises:
            ShapeError: the head size is no multiple of 16.
        """
        if head_size % PAGE:
            raise ShapeError("attention: unsupported head size", expected="a multiple of 16", got=head_size)
        return self._layout.cache.empty(blocks, kv_heads, head_size)
