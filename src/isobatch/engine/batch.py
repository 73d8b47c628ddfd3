"""From a scheduled step to the tensors of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from isobatch.engine.request import Sequence
from isobatch.engine.scheduler import Chunk, ScheduledStep
from isobatch.kernels.layout import PAGE, PagedRows
from isobatch.models.inputs import Batch


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


def tensor(values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor on the CPU, whatever torch's defaults have been set to."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def build_batch(step: ScheduledStep) -> tuple[Batch, list[LogitRow]]:
    """Packs a step's chunks end to end.

    Args:
        step: from the scheduler.

    Returns:
        The batch, and the meaning of each row of logits it asks for.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    logit_rows: list[int] = []
    meanings: list[LogitRow] = []
    for chunk in step.chunks:
        for position in _wanted(chunk):
            logit_rows.append(len(token_ids) + position - chunk.start)
            samples = chunk.samples and position == chunk.stop - 1
            meanings.append(LogitRow(chunk.sequence, position + 1, samples))
        token_ids += chunk.token_ids
        positions += range(chunk.start, chunk.stop)
        slots += [chunk.block_table[p // PAGE] * PAGE + p % PAGE for p in range(chunk.start, chunk.stop)]
        starts.append(len(token_ids))
    widest = max(len(chunk.block_table) for chunk in step.chunks)
    tables = [chunk.block_table + (0,) * (widest - len(chunk.block_table)) for chunk in step.chunks]
    rows = PagedRows(
        tensor(starts, torch.int32),
        tensor([chunk.stop for chunk in step.chunks], torch.int32),
        tensor(tables, torch.int32),
        tensor(slots),
    )
    batch = Batch(tensor(token_ids), tensor(positions), rows, tensor(logit_rows))
    return batch, meanings


def _wanted(chunk: Chunk) -> range | tuple[int, ...]:
    """Positions of the chunk whose logits are wanted: the sampled one, and the prompt's if asked for."""
    sequence = chunk.sequence
    if sequence.params.prompt_logprobs is not None and chunk.start < len(sequence.prompt_ids):
        last = min(chunk.stop, len(sequence.prompt_ids) - 1)
        return (*range(chunk.start, last), *((chunk.stop - 1,) if chunk.samples else ()))
    return (chunk.stop - 1,) if chunk.samples else ()
