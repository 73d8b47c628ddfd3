"""From a scheduled step to the tensors of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.engine.request import Sequence
from isobatch.engine.scheduled import Chunk, ScheduledStep
from isobatch.models.inputs import Batch
from isobatch.ops import Ops


@dataclass(frozen=True, slots=True)
class LogitRow:
    """What one row of logits is for.

    Args:
        sequence: whose it is.
        position: of the token that the logits predict.
        samples: whether the token is to be chosen; otherwise it is a known one of the prompt.
        drafts: what the row takes for granted after the known tokens; it is void if others come.
    """

    sequence: Sequence
    position: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether its drafts have all come, so that its token is the sequence's next."""
        sequence, drafts = self.sequence, self.drafts
        known = self.position - len(drafts)
        return len(sequence) == self.position and sequence.tokens(known, self.position) == drafts


def meanings(step: ScheduledStep) -> tuple[LogitRow, ...]:
    """What each row of logits of a step is for, in order."""
    rows = []
    for chunk in step.chunks:
        last = chunk.stop - 1
        for position in _wanted(chunk):
            samples = chunk.samples and position >= last
            drafts = chunk.drafts[: position - last] if position > last else ()
            rows.append(LogitRow(chunk.sequence, position + 1, samples, drafts))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class Packed:
    """A step's chunks, end to end, in plain integers.

    Args:
        token_ids: of T tokens; a PENDING one is 0.
        positions: of each token in its own sequence.
        slots: where each token's key and value go.
        starts: of R chunks each one's first token, and T.
        lengths: of each chunk the keys that its last token sees.
        logit_rows: the tokens whose next-token logits are wanted.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    starts: list[int]
    lengths: list[int]
    logit_rows: list[int]


def packed(step: ScheduledStep, page: int) -> Packed:
    """Packs a step's chunks, in blocks of `page` tokens."""
    found = Packed([], [], [], [0], [], [])
    for chunk in step.chunks:
        at, table, places = len(found.token_ids), chunk.block_table, range(chunk.start, chunk.end)
        found.logit_rows.extend(at + position - chunk.start for position in _wanted(chunk))
        found.token_ids.extend(chunk.token_ids)
        found.token_ids[-1] = max(0, found.token_ids[-1])
        found.token_ids.extend(chunk.drafts)
        found.positions.extend(places)
        found.slots.extend([table[p // page] * page + p % page for p in places])
        found.starts.append(len(found.token_ids))
        found.lengths.append(chunk.end)
    return found


def build_batch(step: ScheduledStep, ops: Ops) -> Batch:
    """A step's batch.

    Args:
        step: from the scheduler.
        ops: on whose device the batch is to be.

    Returns:
        The batch; a PENDING token is token 0 in it, until it is written.
    """
    found = packed(step, ops.page)
    widest = max(len(chunk.block_table) for chunk in step.chunks)
    tables = [[*chunk.block_table, *[0] * (widest - len(chunk.block_table))] for chunk in step.chunks]
    rows = ops.paged_rows(found.starts, found.lengths, tables, found.slots)
    token_ids, positions, wanted = map(ops.tensor, (found.token_ids, found.positions, found.logit_rows))
    return Batch(token_ids, positions, rows, wanted)


def _wanted(chunk: Chunk) -> range | tuple[int, ...]:
    """Positions of the chunk whose logits are wanted: the sampled ones, and the prompt's if asked for."""
    sequence, stop = chunk.sequence, chunk.stop
    sampled = range(stop - 1, stop + len(chunk.drafts)) if chunk.samples else range(0)
    if sequence.params.prompt_logprobs is not None and chunk.start < len(sequence.prompt_ids):
        last = min(stop, len(sequence.prompt_ids) - 1)
        return (*range(chunk.start, last), *sampled)
    return sampled
