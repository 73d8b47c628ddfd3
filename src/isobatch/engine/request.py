"""One completion in the making: its tokens, and how far they have been computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from isobatch.engine.drafts import Drafter
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IntegrityError


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    """A stop string, a stop token or the end-of-sequence token."""
    LENGTH = "length"
    """`max_tokens`, or the end of the model's context."""
    ABORT = "abort"
    """Whoever asked went away."""
    ERROR = "error"
    """The request failed; its blocks are not offered to others."""


PENDING = -1
"""Stands for a token that is sampled on the device and not known here yet."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The state of one completion, one of the `n` of a request.

    Its tokens are computed in order, in chunks of any size. The chunk that computes the last known token is
    the one whose logits are sampled, so a preempted sequence recomputes its prompt and its own outputs and
    then samples the very token it would have sampled: none is ever drawn twice.

    Args:
        id: names this sequence, unlike any other in the engine.
        prompt_ids: the prompt's token ids.
        params: how tokens are chosen and when to stop.
        seed: the seed actually used, drawn already if the request named none.
        arrival: a counter that rises with every sequence; who came first.
        index: which of the request's `n` completions this is.

    Attributes:
        output_ids: the tokens sampled so far; the last may be PENDING.
        computed: how many tokens, from position 0 on, have their keys and values in the cache.
        block_table: the KV blocks of the positions computed or about to be, in order of position.
        drafter: guesses what comes next, from the tokens that it was shown.
        cached_tokens: how many prompt tokens the first admission found in the prefix cache; for reports only.
        preemptions: how often the sequence lost its blocks.
        finish_reason: None until it is over.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival: int
    index: int = 0
    output_ids: list[int] = field(default_factory=list, init=False)
    computed: int = field(default=0, init=False)
    block_table: list[int] = field(default_factory=list, init=False)
    drafter: Drafter = field(default_factory=Drafter, init=False)
    cached_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def remaining(self) -> int:
        """How many known tokens are not computed yet: 1 while decoding."""
        return len(self) - self.computed

    @property
    def pending(self) -> bool:
        """Whether the last token is not known here yet."""
        return bool(self.output_ids) and self.output_ids[-1] == PENDING

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the token ids of the positions `start` to `stop`, prompt and output alike.

        Args:
            start: the first position, 0 or more.
            stop: the position after the last, at most `len(self)`.

        Returns:
            `stop - start` token ids.
        """
        prompt = len(self.prompt_ids)
        if stop <= prompt:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + tuple(self.output_ids[max(start - prompt, 0) : stop - prompt])

    def append(self, token: int) -> None:
        """Add the token that was sampled from the last known one's logits.

        Args:
            token: its id.

        Raises:
            IntegrityError: the sequence is over, or its last token is not computed, so that nothing can have
                been sampled.
        """
        if self.remaining:  # a finished sequence has nothing computed any more
            raise IntegrityError(
                f"sequence {self.id} got a token it cannot have sampled",
                expected="an unfinished sequence with 0 tokens left to compute",
                got=f"{self.remaining} tokens left, finish reason {self.finish_reason}",
            )
        self.output_ids.append(token)

    def resolve(self, token: int) -> None:
        """Put the token where PENDING stands.

        Raises:
            IntegrityError: no token is pending.
        """
        if not self.pending:
            raise IntegrityError(f"sequence {self.id} got a token", expected="one pending", got="none")
        self.output_ids[-1] = token
