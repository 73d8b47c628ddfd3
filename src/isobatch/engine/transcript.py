"""What a completion has said so far: text, log-probabilities, and whether it is time to stop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from isobatch.engine.output import Completion, TokenLogProbs
from isobatch.engine.receipt import Receipt, abridged, resolved
from isobatch.engine.request import PENDING, FinishReason, Sequence
from isobatch.engine.tokenizer import Detokenizer
from isobatch.errors import IntegrityError
from isobatch.ops.fingerprint import Identity


@dataclass(slots=True)
class Transcript:
    """The visible side of a sequence.

    Args:
        sequence: the completion.
        detokenizer: turns its tokens into text, or None for a model without a tokenizer.
    """

    sequence: Sequence
    detokenizer: Detokenizer | None
    text: str = ""
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    row_digests: list[bytes] = field(default_factory=list)
    stop_reason: str | int | None = None

    @property
    def known(self) -> int:
        """How many tokens have come; the sequence may have one more, not seen yet."""
        ids = self.sequence.output_ids
        return len(ids) - (ids[-1:] == [PENDING])

    @property
    def told(self) -> str:
        """The text without what a stop string still to come might take back."""
        if self.sequence.finish_reason is not None:
            return self.text
        stops, text = self.sequence.params.stop, self.text
        beginnings = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(beginnings, default=0)]

    def push(self, token: int, eos_token_ids: Collection[int], token_limit: int) -> FinishReason | None:
        """Takes in the token just appended to the sequence.

        Args:
            token: its id.
            eos_token_ids: tokens that end a reply, unless the request ignores them.
            token_limit: prompt and reply together may not be longer than this.

        Returns:
            Why the completion is over, or None if it goes on.
        """
        params = self.sequence.params
        if token in params.stop_token_ids or (not params.ignore_eos and token in eos_token_ids):
            self.stop_reason = token if token in params.stop_token_ids else None
            self._say("", last=True)
            return FinishReason.STOP
        last = len(self.sequence) >= token_limit
        if self.detokenizer is not None:
            self._say(self.detokenizer.push(token), last=last)
        if self.stop_reason is not None:
            return FinishReason.STOP
        return FinishReason.LENGTH if last else None

    def _say(self, new: str, *, last: bool) -> None:
        """Adds text, and cuts it at the first stop string that it completes."""
        if last and self.detokenizer is not None:
            new += self.detokenizer.flush()
        params = self.sequence.params
        searched = len(self.text)
        self.text += new
        earliest = len(self.text)
        for stop in params.stop:
            # A stop string may have begun in text that was already there, so look back by its length.
            at = self.text.find(stop, max(0, searched - len(stop) + 1))
            if 0 <= at < earliest:
                earliest, self.stop_reason = at, stop
        if isinstance(self.stop_reason, str):
            kept = earliest + (len(self.stop_reason) if params.include_stop_str_in_output else 0)
            self.text = self.text[:kept]

    def completion(self, identity: Identity | None, token_limit: int) -> Completion:
        """The finished completion.

        Args:
            identity: of whoever replied, for the receipt; None without one, where none can be asked for.
            token_limit: as for `push`.

        Raises:
            IntegrityError: it is not finished.
        """
        sequence = self.sequence
        return Completion(
            index=sequence.index,
            text=self.text,
            token_ids=tuple(sequence.output_ids),
            finish_reason=self._reason(),
            stop_reason=self.stop_reason,
            log_probs=None if sequence.params.logprobs is None else tuple(self.log_probs),
            seed=sequence.seed,
            preemptions=sequence.preemptions,
            receipt=self.receipt(identity, token_limit) if identity and sequence.params.receipt else None,
        )

    def receipt(self, identity: Identity, token_limit: int) -> Receipt:
        """The receipt of the finished completion.

        Args:
            identity: of whoever replied.
            token_limit: as for `push`.

        Raises:
            IntegrityError: it is not finished.
        """
        sequence, reason = self.sequence, self._reason()
        rows, logits = abridged(self.row_digests)
        room = token_limit - len(sequence.prompt_ids)
        return Receipt(
            identity=identity,
            prompt_token_ids=sequence.prompt_ids,
            params=resolved(sequence.params, seed=sequence.seed, max_tokens=room),
            token_ids=tuple(sequence.output_ids),
            text=self.text,
            finish_reason=reason,
            stop_reason=self.stop_reason,
            rows=rows,
            logits=logits,
        )

    def _reason(self) -> FinishReason:
        if self.sequence.finish_reason is None:
            raise IntegrityError(f"sequence {self.sequence.id} is not finished")
        return self.sequence.finish_reason
