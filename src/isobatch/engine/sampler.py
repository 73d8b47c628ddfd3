"""From rows of logits to tokens and log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch

from isobatch.engine.output import TokenLogProbs
from isobatch.engine.request import Sequence
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows
from isobatch.ops import Ops


def choose(ops: Ops, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The tokens of `draw`, waited for."""
    tokens: list[int] = draw(ops, logits, sequences).tolist()
    return tokens


def needs_history(sequence: Sequence) -> bool:
    """Whether the choice of a token depends on the tokens before it, beside the logits."""
    p = sequence.params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def draw(ops: Ops, logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Chooses the next token of each sequence.

    Args:
        ops: what to compute with.
        logits: float32 [S, V], one row per sequence.
        sequences: whose rows these are.

    Returns:
        int64 [S], -1 where the logits hold NaN or infinity.

    Determinism:
        Each token depends on its row of logits, and its sequence's parameters, seed and tokens.
    """
    params = [sequence.params for sequence in sequences]
    if any(needs_history(sequence) for sequence in sequences):
        logits = ops.penalize(logits, _penalty_rows(ops, sequences))
    rows = SamplingRows(
        temperature=ops.tensor([p.temperature for p in params], torch.float32),
        top_k=ops.tensor([p.top_k for p in params]),
        top_p=ops.tensor([p.top_p for p in params], torch.float32),
        min_p=ops.tensor([p.min_p for p in params], torch.float32),
        seed=ops.tensor([_signed(sequence.seed) for sequence in sequences]),
        position=ops.tensor([len(sequence) for sequence in sequences]),
        greedy=all(p.temperature == 0 for p in params),
        unfiltered=all(p.top_k == 0 and p.top_p == 1 for p in params),
    )
    return ops.sample(logits, rows)


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


def _penalty_rows(ops: Ops, sequences: Rows[Sequence]) -> PenaltyRows:
    seen: list[dict[int, int]] = []
    for sequence in sequences:
        counts: dict[int, int] = {}
        if needs_history(sequence):
            counts = dict.fromkeys(sequence.prompt_ids, 0) | Counter(sequence.output_ids)
        seen.append(counts)
    widest = max(1, *map(len, seen))
    params = [sequence.params for sequence in sequences]
    return PenaltyRows(
        ids=ops.tensor([[*c, *[-1] * (widest - len(c))] for c in seen]),
        counts=ops.tensor([[*c.values(), *[0] * (widest - len(c))] for c in seen]),
        repetition=ops.tensor([p.repetition_penalty for p in params], torch.float32),
        presence=ops.tensor([p.presence_penalty for p in params], torch.float32),
        frequency=ops.tensor([p.frequency_penalty for p in params], torch.float32),
    )
