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
    """

    sequence: Sequence
    position: int
    samples: bool


def meanings(step: ScheduledStep) -> tuple[LogitRow, ...]:
    """What each row of logits of a step is for, in order."""
    return tuple(
        LogitRow(chunk.sequence, position + 1, chunk.samples and position == chunk.stop - 1)
        for chunk in step.chunks
        for position in _wanted(chunk)
    )


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
        positions += range(chunk.start, chunk.stop)
        slots += [chunk.block_table[p // page] * page + p % page for p in range(chunk.start, chunk.stop)]
        starts.append(len(token_ids))
    widest = max(len(chunk.block_table) for chunk in step.chunks)
    tables = [[*chunk.block_table, *[0] * (widest - len(chunk.block_table))] for chunk in step.chunks]
    rows = ops.paged_rows(starts, [chunk.stop for chunk in step.chunks], tables, slots)
    return Batch(ops.tensor(token_ids), ops.tensor(positions), rows, ops.tensor(logit_rows))


def _wanted(chunk: Chunk) -> range | tuple[int, ...]:
    """Positions of the chunk whose logits are wanted: the sampled one, and the prompt's if asked for."""
    sequence = chunk.sequence
    if sequence.params.prompt_logprobs is not None and chunk.start < len(sequence.prompt_ids):
        last = min(chunk.stop, len(sequence.prompt_ids) - 1)
        return (*range(chunk.start, last), *((chunk.stop - 1,) if chunk.samples else ()))
    return (chunk.stop - 1,) if chunk.samples else ()
