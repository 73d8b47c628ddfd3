"""Ops of a device that works through a queue: calls return before their work is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from isobatch.kernels.layout import PagedRows
from isobatch.ops.ops import Ops


class Tiling(Protocol):
    """How requests of any number of queries are told apart for kernels that take `TiledRows`."""

    def cut(self, queries: Sequence[int], contexts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Cuts requests into tiles of query rows, but for single queries that are better served alone.

        Args:
            queries: of each request.
            contexts: of each request, its queries' own keys included.

        Returns:
            For each tile the request, and where in it the tile begins; and the requests that have no tile.
        """


class QueuedOps(Ops, ABC):
    """What an engine needs to keep a queue filled.

    Attributes:
        tiling: for steps of chunks that are to be recorded; None if these kernels cannot be.
    """

    tiling: Tiling | None = None

    @abstractmethod
    def send(self, numbers: torch.Tensor, to: torch.Tensor) -> None:
        """Queues a copy from the host; nobody may change the numbers any more.

        Args:
            numbers: on the CPU.
            to: alike, on the device.
        """

    @abstractmethod
    def fill_in(
        self, known: torch.Tensor, places: torch.Tensor, sampled: torch.Tensor, to: torch.Tensor
    ) -> None:
        """Queues the gathering of a recorded step's tokens: right before that step, for speed.

        Args:
            known: int64 [T], the tokens that the host knows.
            places: int32 [T], the place in `sampled` of each token that it does not know; -1 for one it does.
            sampled: int64 [S], what the step before has sampled. -1 for a row that was refused, whose request
                fails when that is read: any token will do, and 0 is taken.
            to: int64 [T].
        """

    @abstractmethod
    def decode_rows(
        self, lengths: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, context: int
    ) -> PagedRows:
        """Rows of one query each, whose lengths, tables and slots are read where they lie when kernels run.

        They must be settled (`PagedRows`) whenever these do.

        Args:
            lengths: int32 [R], 0 for a padded row.
            tables: int32 [R, pages].
            slots: int64 [R], -1 for a padded row.
            context: no length will be more.
        """

    @abstractmethod
    def recorded(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Records work, to queue it again at the cost of one launch.

        Args:
            work: reads its inputs where they will lie. It is run once before: what is to be compiled or
                certified for it is so then.

        Returns:
            What queues the work again, and its result, which each time overwrites. All recordings share
            their memory, so another may overwrite it too.
        """
