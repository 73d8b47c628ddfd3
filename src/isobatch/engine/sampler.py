"""From rows of logits to tokens and log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import torch

from isobatch.engine.output import TokenLogProbs
from isobatch.engine.request import Sequence
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows
from isobatch.ops import Ops


def choose(ops: Ops, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Chooses the next token of each sequence.

    Args:
        ops: what to compute with.
        logits: float32 [S, V], one row per sequence.
        sequences: whose rows these are.

    Returns:
        S token ids, -1 where the logits hold NaN or infinity.

    Determinism:
        Each token depends on its row of logits, and its sequence's parameters, seed and tokens.
    """
    params = [sequence.params for sequence in sequences]
    if any(_penalized(sequence) for sequence in sequences):
        logits = ops.penalize(logits, _penalty_rows(ops, sequences))
    rows = SamplingRows(
        temperature=ops.tensor([p.temperature for p in params], torch.float32),
        top_k=ops.tensor([p.top_k for p in params]),
        top_p=ops.tensor([p.top_p for p in params], torch.float32),
        min_p=ops.tensor([p.min_p for p in params], torch.float32),
        seed=ops.tensor([_signed(sequence.seed) for sequence in sequences]),
        position=ops.tensor([len(sequence) for sequence in sequences]),
    )
    tokens: list[int] = ops.sample(logits, rows).tolist()
    return tokens


def log_probs(ops: Ops, logits: torch.Tensor, asked: Rows[tuple[int, int]]) -> list[TokenLogProbs]:
    """Log-probabilities of given tokens.

    Args:
        ops: what to compute with.
        logits: float32 [S, V].
        asked: for each row the token, and how many of the likeliest to report; at most V are.
    """
    most = min(max(count for _, count in asked), logits.shape[1])
    found = ops.top_log_probs(logits, ops.tensor([token for token, _ in asked]), most)
    ids, values = found.ids.tolist(), found.log_probs.tolist()
    return [
        TokenLogProbs(
            token,
            float(found.chosen[i]),
            int(found.rank[i]),
            tuple(zip(ids[i][:count], values[i][:count], strict=True)),
        )
        for i, (token, count) in enumerate(asked)
    ]


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer, which is what tensors hold."""
    return word - (1 << 64) if word >> 63 else word


def _penalized(sequence: Sequence) -> bool:
    p = sequence.params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _penalty_rows(ops: Ops, sequences: Rows[Sequence]) -> PenaltyRows:
    seen: list[dict[int, int]] = []
    for sequence in sequences:
        counts: dict[int, int] = {}
        if _penalized(sequence):
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
