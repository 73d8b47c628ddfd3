"""A planned step, in plain integers: which tokens of which sequences, and where their keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, to be computed in one step.

    Attributes:
        sequence: whose they are.
        start: the position of the first; all before it are in the KV cache.
        token_ids: the tokens, at least one.
        block_table: the sequence's blocks, enough for the chunk's last token.
        samples: whether the chunk ends at the last known token, so that its logits give the next one.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    samples: bool

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What one run of the model computes.

    Attributes:
        chunks: at least one; at most one per sequence.
        preempted: the ids of the sequences that lost their blocks while the step was planned.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[int, ...]
