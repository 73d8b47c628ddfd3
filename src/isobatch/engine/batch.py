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


def build_batch(step: ScheduledStep, ops: Ops) -> Batch:
    """Packs a step's chunks end to end.

    Args:
        step: from the scheduler.
        ops: on whose device the batch is to be.

    Returns:
        The batch; a PENDING token is token 0 in it, until it is written.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    page = ops.page
    logit_rows: list[int] = []
    for chunk in step.chunks:
        logit_rows += [len(token_ids) + position - chunk.start for position in _wanted(chunk)]
        token_ids += chunk.token_ids
        token_ids[-1] = max(0, token_ids[-1])
        token_ids += chunk.drafts
        positions += range(chunk.start, chunk.end)
        slots += [chunk.block_table[p // page] * page + p % page for p in range(chunk.start, chunk.end)]
        starts.append(len(token_ids))
    widest = max(len(chunk.block_table) for chunk in step.chunks)
    tables = [[*chunk.block_table, *[0] * (widest - len(chunk.block_table))] for chunk in step.chunks]
    rows = ops.paged_rows(starts, [chunk.end for chunk in step.chunks], tables, slots)
    return Batch(ops.tensor(token_ids), ops.tensor(positions), rows, ops.tensor(logit_rows))


def _wanted(chunk: Chunk) -> range | tuple[int, ...]:
    """Positions of the chunk whose logits are wanted: the sampled ones, and the prompt's if asked for."""
    sequence, stop = chunk.sequence, chunk.stop
    sampled = range(stop - 1, stop + len(chunk.drafts)) if chunk.samples else range(0)
    if sequence.params.prompt_logprobs is not None and chunk.start < len(sequence.prompt_ids):
        last = min(stop, len(sequence.prompt_ids) - 1)
        return (*range(chunk.start, last), *sampled)
    return sampled
