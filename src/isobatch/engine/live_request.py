"""A request in flight: what was asked, and how far its completions are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from isobatch.engine.output import Reply, TokenLogProbs
from isobatch.engine.request import Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.transcript import Transcript
from isobatch.errors import NonFiniteLogitsError, RequestError
from isobatch.ops.fingerprint import Identity


@dataclass(slots=True)
class LiveRequest:
    """The first four fields never change: from them it can be begun again.

    Args:
        id: names it.
        prompt_ids: the prompt's token ids.
        params: how to continue it.
        seed: the seed actually used.
        transcripts: of its n completions.
        prompt_log_probs: by position.
        error: why it has failed, if it has.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    transcripts: list[Transcript] = field(default_factory=list)
    prompt_log_probs: dict[int, TokenLogProbs] = field(default_factory=dict)
    error: RequestError | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion is over."""
        return all(t.sequence.finish_reason is not None for t in self.transcripts)

    def unfinite(self, position: int) -> NonFiniteLogitsError:
        """What is said when logits are not numbers for a position."""
        # Of several completions the load decides which is the first to fail, so that is not said.
        where = f"for position {position}, " if self.params.n == 1 else ""
        return NonFiniteLogitsError(
            f"the model gave NaN or infinity {where}with seed {self.seed}",
            expected="finite logits",
            fix="check the weights for NaN and the penalties for extremes; no token was made up",
        )

    def reply(self, identity: Identity | None, token_limit: Callable[[Sequence], int]) -> Reply:
        """What it came to.

        Args:
            identity: of model and numerics, or None.
            token_limit: of a sequence, as `Scheduler.token_limit`.
        """
        first = self.transcripts[0].sequence
        prompt_log_probs = None
        if first.params.prompt_logprobs is not None and self.error is None:
            prompt_log_probs = tuple(self.prompt_log_probs[p] for p in range(1, len(self.prompt_ids)))
        # How far the others of the n were when one failed is a matter of the load: they are not handed out.
        finished = () if self.error is not None else self.transcripts
        limit = token_limit(first)
        return Reply(
            request_id=self.id,
            prompt_token_ids=self.prompt_ids,
            completions=tuple(transcript.completion(identity, limit) for transcript in finished),
            prompt_log_probs=prompt_log_probs,
            cached_tokens=first.cached_tokens,
            fingerprint=None if identity is None else identity.fingerprint,
            error=self.error,
        )
