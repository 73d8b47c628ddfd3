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


def needs_logits(row: LogitRow) -> bool:
    """Whether anything but the choice of a token depends on the row of logits, or the choice on more."""
    p = row.sequence.params
    return p.logprobs is not None or p.receipt or bool(row.drafts) or needs_history(row.sequence)


COLUMNS = {
    "temperature": torch.float32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "top_k": torch.int64,
    "seed": torch.int64,
    "position": torch.int64,
}
"""The tensors of `SamplingRows`."""


def columns(drawn: Rows[LogitRow]) -> dict[str, list[float]]:
    """The numbers in them."""
    params = [row.sequence.params for row in drawn]
    return {
        "temperature": [p.temperature for p in params],
        "top_p": [p.top_p for p in params],
        "min_p": [p.min_p for p in params],
        "top_k": [p.top_k for p in params],
        "seed": [_signed(row.sequence.seed) for row in drawn],
        "position": [row.position for row in drawn],
    }


def kind(drawn: Rows[LogitRow]) -> tuple[bool, bool]:
    """Whether all rows are greedy, and whether none is filtered: what `SamplingRows` wants to know."""
    params = [row.sequence.params for row in drawn]
    return all(p.temperature == 0 for p in params), all(p.top_k == 0 and p.top_p == 1 for p in params)


def sampling_rows(ops: Ops, drawn: Rows[LogitRow]) -> SamplingRows:
    """What the choice of each row's token depends on, beside the logits and what came before."""
    # Two uploads rather than six: on a GPU each takes longer than choosing the token does. Each row begins at
    # 16 bytes, for which the kernels are compiled.
    S, spare, found = len(drawn), [0] * (-len(drawn) % 4), columns(drawn)
    parts: dict[str, torch.Tensor] = {}
    for dtype in (torch.float32, torch.int64):
        names = [name for name in COLUMNS if COLUMNS[name] == dtype]
        sent = ops.tensor([[*found[name], *spare] for name in names], dtype)[:, :S]
        parts |= dict(zip(names, sent, strict=True))
    greedy, unfiltered = kind(drawn)
    return SamplingRows(**parts, greedy=greedy, unfiltered=unfiltered)


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
