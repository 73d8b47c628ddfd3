"""A planned step, in plain integers: which tokens of which sequences, and where their keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from isobatch.engine.prefix_cache import Node
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
        drafts: guesses of the tokens after the last known one, to be computed behind it and sampled from as
            well; only where the chunk samples. The block table is enough for these too.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)

    @property
    def end(self) -> int:
        """The position after the last draft."""
        return self.stop + len(self.drafts)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What one run of the model computes.

    Attributes:
        chunks: at least one; at most one per sequence.
        preempted: the ids of the sequences that lost their blocks while the step was planned.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[int, ...]


@dataclass(slots=True)
class Plan:
    """A step in the making.

    Attributes:
        budget: how many tokens it has room for.
        chunks: by the id of their sequence.
        preempted: as in the step.
        admitting: whether sequences that wait may still be let in.
        filling: the block that each chunk fills first, as (what comes before it, its tokens).
    """

    budget: int
    chunks: dict[int, Chunk] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)
    admitting: bool = True
    filling: set[tuple[Node, tuple[int, ...]]] = field(default_factory=set)
