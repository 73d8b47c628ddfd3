"""What recordings read of a step: one piece of memory on the device, filled by one copy from the host.

At a batch of one every copy, however small, takes as long as a layer's norm. So all numbers of a step go up
together, each kind in a section of its own. Sections begin at 16 bytes, for which kernels are compiled. A
step's tokens are gathered elsewhere, for some are sampled on the device, and not known when the rest goes up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""The sections of a recording's inputs, by name, in order. The first are TOKENS and PLACES."""
TOKENS = "tokens"
PLACES = "places"
"""Of tokens that nobody has seen yet, the place among those that the step before has sampled."""
KNOWN = -1
"""The place of a token that is known."""
NOWHERE = -1
"""The slot of a padded row."""


def token_sections(rows: int) -> dict[str, Section]:
    """What every recording reads of its tokens, padded ones included; a form begins with it."""
    whole = Section(torch.int64, rows)
    return {
        TOKENS: whole,
        PLACES: Section(torch.int32, rows, fill=KNOWN),
        "positions": whole,
        "slots": Section(torch.int64, rows, fill=NOWHERE),
    }


def _bytes(form: Form) -> int:
    return sum(section.bytes for section in form.values())


class GraphInputs:
    """The memory.

    Args:
        ops: on whose device.
        forms: that there will be, or the largest of them.
    """

    def __init__(self, ops: QueuedOps, forms: Sequence[Form]) -> None:
        self._ops = ops
        self._memory = torch.zeros(max(map(_bytes, forms)), dtype=torch.uint8, device=ops.device)
        most = max(form[TOKENS].length for form in forms)
        self._ids = torch.zeros(most, dtype=torch.int64, device=ops.device)

    def views(self, form: Form) -> dict[str, torch.Tensor]:
        """The sections on the device, in which each step of this form will find its numbers."""
        return self._cut(self._memory, form)

    def token_ids(self, form: Form) -> torch.Tensor:
        """Where each step of this form will find its tokens, int64; till then zeros, or an earlier step's."""
        return self._ids[: form[TOKENS].length]

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
        self._ops.send(here, self._memory[:size])

    def fill_in(self, form: Form, sampled: torch.Tensor | None) -> None:
        """Queues the gathering of a step's tokens, with those that the step before has sampled, int64 [S]."""
        known, places = self.views({name: form[name] for name in (TOKENS, PLACES)}).values()
        self._ops.fill_in(known, places, known if sampled is None else sampled, self.token_ids(form))

    @staticmethod
    def _cut(memory: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
        parts, at = {}, 0
        for name, section in form.items():
            whole = memory[at : at + section.length * section.dtype.itemsize]
            parts[name] = whole.view(section.dtype)
            at += section.bytes
        return parts
