"""What a user gets back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from isobatch.engine.receipt import Receipt
from isobatch.engine.request import FinishReason
from isobatch.errors import RequestError


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """How likely a token was, by the model's logits before penalties, temperature and filters.

    Args:
        token_id: the token.
        log_prob: its natural-log probability, float32.
        rank: 1 for the likeliest; among equals the lower token id comes first.
        top: the likeliest tokens and their log-probabilities, best first, as many as were asked for.
    """

    token_id: int
    log_prob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One of a request's n completions.

    Args:
        index: which of the n.
        text: decoded, special tokens left out, cut at the stop string.
        token_ids: all sampled tokens, the stopping one included.
        finish_reason: why it ended.
        stop_reason: the stop string or stop token that ended it, or None.
        log_probs: one entry per token if asked for, else None.
        seed: what its random choices were made from; pass it to get the same reply again.
        preemptions: how often it lost its KV blocks and was recomputed; no bit depends on it.
        receipt: by which it can be verified, if asked for, else None.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    log_probs: tuple[TokenLogProbs, ...] | None
    seed: int
    preemptions: int
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request.

    Args:
        request_id: as `Engine.add` returned it.
        prompt_token_ids: what the model was given.
        completions: n of them, by index; none if the request failed.
        prompt_log_probs: one entry per prompt token from the second on if asked for, else None.
        cached_tokens: prompt tokens found in the prefix cache; no bit depends on it.
        fingerprint: names model and numerics; None with stock kernels, which promise nothing.
        error: why the request failed, or None.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_log_probs: tuple[TokenLogProbs, ...] | None
    cached_tokens: int
    fingerprint: str | None
    error: RequestError | None = None

    @property
    def text(self) -> str:
        """The first completion's text.

        Raises:
            RequestError: the request failed.
        """
        if self.error is not None:
            raise self.error
        return self.completions[0].text

    def asked_as(
        self, *, prompt: str | None = None, messages: Iterable[Mapping[str, Any]] | None = None
    ) -> Reply:
        """The same reply with receipts, if it has any, that say what the prompt's tokens were made from.

        Args:
            prompt: as for `Receipt.asked_as`.
            messages: likewise.
        """
        completions = tuple(
            one
            if one.receipt is None
            else replace(one, receipt=one.receipt.asked_as(prompt=prompt, messages=messages))
            for one in self.completions
        )
        return replace(self, completions=completions)
