"""From rows of logits to tokens and log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch

from isobatch.engine.batch import LogitRow
from isobatch.engine.output import TokenLogProbs
from isobatch.engine.request import Sequence
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows
from isobatch.ops import Ops


def choose(ops: Ops, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence, by `draw`, waited for."""
    rows = [LogitRow(sequence, len(sequence), samples=True) for sequence in sequences]
    tokens: list[int] = draw(ops, logits, rows).tolist()
    return tokens


def needs_history(sequence: Sequence) -> bool:
    """Whether the choice of a token depends on the tokens before it, beside the logits."""
    p = sequence.params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def draw(ops: Ops, logits: torch.Tensor, drawn: Rows[LogitRow]) -> torch.Tensor:
    """Chooses a token for each row.

    Args:
        ops: what to compute with.
        logits: float32 [S, V].
        drawn: what the rows are for. Drafts that a row takes for granted count as tokens of its sequence.

    Returns:
        int64 [S], -1 where the logits hold NaN or infinity.

    Determinism:
        Each token depends on its row of logits, its position, and its sequence's parameters, seed and tokens.
    """
    if any(needs_history(row.sequence) for row in drawn):
        logits = ops.penalize(logits, _penalty_rows(ops, drawn))
    return ops.sample(logits, sampling_rows(ops, drawn))


def sampling_rows(ops: Ops, drawn: Rows[LogitRow]) -> SamplingRows:
    """What the choice of each row's token depends on, beside the logits and what came before."""
    params = [row.sequence.params for row in drawn]
    # Two uploads rather than six: on a GPU each takes longer than choosing the token does. Each row begins at
    # 16 bytes, for which the kernels are compiled.
    S, spare = len(drawn), [0] * (-len(drawn) % 4)
    numbers = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
    counts = [
        [p.top_k for p in params],
        [_signed(row.sequence.seed) for row in drawn],
        [row.position for row in drawn],
    ]
    temperature, top_p, min_p = ops.tensor([[*row, *spare] for row in numbers], torch.float32)[:, :S]
    top_k, seed, position = ops.tensor([[*row, *spare] for row in counts])[:, :S]
    return SamplingRows(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        position=position,
        greedy=all(p.temperature == 0 for p in params),
        unfiltered=all(p.top_k == 0 and p.top_p == 1 for p in params),
    )


def log_probs(
    ops: Ops, logits: torch.Tensor, tokens: torch.Tensor, counts: Rows[int]
) -> Callable[[], list[TokenLogProbs]]:
    """Log-probabilities of given tokens.

    Args:
        ops: what to compute with.
        logits: float32 [S, V].
        tokens: int64 [S].
        counts: for each row how many of the likeliest to report; at most V are.

    Returns:
        What waits for them.
    """
    found = ops.top_log_probs(logits, tokens, min(max(counts), logits.shape[1]))
    columns = [ops.fetch(t) for t in (tokens, found.chosen, found.rank, found.ids, found.log_probs)]

    def read() -> list[TokenLogProbs]:
        rows = zip(*(column().tolist() for column in columns), counts, strict=True)
        return [
            TokenLogProbs(token, chosen, rank, tuple(zip(ids[:count], values[:count], strict=True)))
            for token, chosen, rank, ids, values, count in rows
        ]

    return read


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer, which is what tensors hold."""
    return word - (1 << 64) if word >> 63 else word


def _penalty_rows(ops: Ops, drawn: Rows[LogitRow]) -> PenaltyRows:
    seen: list[dict[int, int]] = []
    for row in drawn:
        sequence, counts = row.sequence, dict[int, int]()
        if needs_history(sequence):
            said = Counter((*sequence.output_ids, *row.drafts))
            counts = dict.fromkeys(sequence.prompt_ids, 0) | said
        seen.append(counts)
    widest = max(1, *map(len, seen))
    params = [row.sequence.params for row in drawn]
    return PenaltyRows(
        ids=ops.tensor([[*c, *[-1] * (widest - len(c))] for c in seen]),
        counts=ops.tensor([[*c.values(), *[0] * (widest - len(c))] for c in seen]),
        repetition=ops.tensor([p.repetition_penalty for p in params], torch.float32),
        presence=ops.tensor([p.presence_penalty for p in params], torch.float32),
        frequency=ops.tensor([p.frequency_penalty for p in params], torch.float32),
    )
