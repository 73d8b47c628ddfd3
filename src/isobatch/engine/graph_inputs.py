"""What recordings read of a step: one piece of memory on the device, filled by one copy from the host.

At a batch of one every copy, however small, takes as long as a layer's norm. So all numbers of a step go up
together, each kind in a section of its own. Sections begin at 16 bytes, for which kernels are compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from isobatch.ops.queued import QueuedOps

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Section:
    """Numbers of one kind.

    Args:
        dtype: of each.
        length: how many.
        fill: stands in places that a step leaves open.
    """

    dtype: torch.dtype
    length: int
    fill: int = 0

    @property
    def bytes(self) -> int:
        """Of the section, with what aligns the next."""
        return -(-self.length * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


Form = Mapping[str, Section]
"""The sections of a recording's inputs, by name, in order. The first is TOKENS."""
TOKENS = "tokens"
NOWHERE = -1
"""The slot of a padded row."""


def token_sections(rows: int) -> dict[str, Section]:
    """What every recording reads of its tokens, padded ones included; a form begins with it."""
    whole = Section(torch.int64, rows)
    return {
        TOKENS: whole,
        "sources": whole,
        "positions": whole,
        "slots": Section(torch.int64, rows, fill=NOWHERE),
    }


def _bytes(form: Form) -> int:
    return sum(section.bytes for section in form.values())


class GraphInputs:
    """The memory, behind the tokens that the step before has sampled.

    Args:
        ops: on whose device.
        sampled: the most tokens that a step samples.
        forms: that there will be, or the largest of them.
    """

    def __init__(self, ops: QueuedOps, sampled: int, forms: Iterable[Form]) -> None:
        self._ops = ops
        self._sampled = Section(torch.int64, sampled)
        room = max(map(_bytes, forms))
        self._memory = torch.zeros(self._sampled.bytes + room, dtype=torch.uint8, device=ops.device)

    def views(self, form: Form) -> dict[str, torch.Tensor]:
        """The sections on the device, in which each step of this form will find its numbers."""
        return self._cut(self._memory[self._sampled.bytes :], form)

    def send(self, form: Form, numbers: Mapping[str, Sequence[float]]) -> None:
        """Queues the copy.

        Args:
            form: the sections.
            numbers: for each section, as many as are known; the rest is filled.
        """
        size = _bytes(form)
        here = torch.zeros(size, dtype=torch.uint8)
        for name, part in self._cut(here, form).items():
            known = numbers.get(name, ())
            if form[name].fill:
                part[len(known) :] = form[name].fill
            if known:
                part[: len(known)] = torch.tensor(known, dtype=part.dtype)
        self._ops.send(here, self._memory[self._sampled.bytes :][:size])

    def take(self, tokens: torch.Tensor) -> None:
        """Queues a copy of the tokens that the step before has sampled, as `QueuedOps.hand_on`; int64 [S]."""
        self._ops.hand_on(tokens, self._memory.view(torch.int64))

    def sources(self, count: int, pending: Mapping[int, int]) -> list[int]:
        """Where each token of a step is to be found, for `tokens`.

        Args:
            count: the step's tokens.
            pending: of those that nobody has seen yet, the place among the tokens of `take`.
        """
        first = self._sampled.bytes // 8
        return [pending.get(at, first + at) for at in range(count)]

    def tokens(self, sources: torch.Tensor) -> torch.Tensor:
        """The step's token ids, int64 like `sources`."""
        return self._memory.view(torch.int64).index_select(0, sources)

    @staticmethod
    def _cut(memory: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
        parts, at = {}, 0
        for name, section in form.items():
            whole = memory[at : at + section.length * section.dtype.itemsize]
            parts[name] = whole.view(section.dtype)
            at += section.bytes
        return parts
