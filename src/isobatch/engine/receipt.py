"""Receipts: what a reply was asked and said, with digests of the logits that it was sampled from.

A receipt is for one completion, and says nothing that depends on how it came about: not the load, not how
many completions were asked for beside it, not which log-probabilities were reported. So equal requests have
equal receipts, byte for byte, and whoever has the weights can make the receipt again (engine/verify.py).

Written form, schema 1: a JSON object. `logits.rows[i]` is the beginning, 8 hexadecimal digits, of d_i, the
SHA-256 of the row of logits that token i was sampled from: V float32 numbers, little-endian, as the model
gave them, before penalties, temperature and filters. `logits.digest` is the SHA-256 of d_0, d_1, ... one
after the other, 32 bytes each. `digest` is the SHA-256 of the object without it, as JSON with sorted keys, no
spaces and ASCII alone. Parameters count by value, since 1 and 1.0 are one number to some writers of JSON; the
seed is a text, since 64 bits are too many for some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from isobatch.engine.request import FinishReason
from isobatch.engine.sampling_params import SamplingParams
from isobatch.ops.fingerprint import Identity

SCHEMA = 1
"""Raised when the written form changes."""
PREFIX = 8
"""Hexadecimal digits of a row's digest that the receipt keeps: to name the first token that differs."""

# What a request wants reported, not what it wants said.
_REPORTED = ("n", "logprobs", "prompt_logprobs", "receipt")
PARAMS = tuple(field.name for field in fields(SamplingParams) if field.name not in _REPORTED)
"""The sampling parameters that a receipt has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was asked, what was said, and by what.

    Args:
        identity: of the model and the numerics that replied.
        prompt_token_ids: what the model was given.
        prompt: the text that these are the tokens of, where the request was a text.
        messages: the conversation likewise, by the model's own chat template.
        params: how tokens were chosen, with what the engine had filled in: the completion's own seed, and
            `max_tokens` no more than the context had room for.
        token_ids: the reply, the stopping token included.
        text: of the reply, cut at the stop string.
        finish_reason: why it ended.
        stop_reason: the stop string or stop token that ended it, or None.
        rows: for each token the beginning of the digest of its row of logits.
        logits: the digest of all these digests.
    """

    identity: Identity
    prompt_token_ids: tuple[int, ...]
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    params: SamplingParams
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    rows: tuple[str, ...]
    logits: str

    @property
    def fingerprint(self) -> str:
        """That of the reply."""
        return self.identity.fingerprint

    @property
    def digest(self) -> str:
        """Of everything else in the receipt, 64 hexadecimal digits."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def asked_as(
        self, *, prompt: str | None = None, messages: Iterable[Mapping[str, Any]] | None = None
    ) -> Receipt:
        """The same receipt with what its prompt's tokens were made from.

        Args:
            prompt: the text, if `Tokenizer.encode` made them from it.
            messages: the conversation, if `Tokenizer.chat` wrote it out, ready for the assistant's turn.
        """
        listed = None if messages is None else tuple(dict(message) for message in messages)
        return replace(self, prompt=prompt, messages=listed)

    def as_dict(self) -> dict[str, Any]:
        """The written form, for a JSON writer."""
        return {**self._content(), "digest": self.digest}

    def to_json(self) -> str:
        """The written form as a line of text."""
        return json.dumps(self.as_dict()) + "\n"

    def _content(self) -> dict[str, Any]:
        params = {name: getattr(self.params, name) for name in PARAMS}
        return {
            "isobatch_receipt": SCHEMA,
            "fingerprint": self.fingerprint,
            "identity": asdict(self.identity),
            "prompt": {
                "token_ids": list(self.prompt_token_ids),
                "text": self.prompt,
                "messages": None if self.messages is None else list(self.messages),
            },
            "params": {**params, "seed": str(self.params.seed)},
            "completion": {
                "token_ids": list(self.token_ids),
                "text": self.text,
                "finish_reason": self.finish_reason.value,
                "stop_reason": self.stop_reason,
            },
            "logits": {"rows": list(self.rows), "digest": self.logits},
        }


def resolved(params: SamplingParams, *, seed: int, max_tokens: int) -> SamplingParams:
    """The parameters of one completion as its receipt has them.

    Args:
        params: as the request gave them.
        seed: the completion's own.
        max_tokens: what there was room for.
    """
    return replace(
        params, seed=seed, max_tokens=max_tokens, n=1, logprobs=None, prompt_logprobs=None, receipt=True
    )


def row_digests(logits: torch.Tensor) -> list[bytes]:
    """The digests of rows of logits.

    Args:
        logits: float32 [S, V], on any device.

    Returns:
        The SHA-256 of each row's numbers, little-endian.

    Determinism:
        Each depends on the bits of its own row.
    """
    rows = logits.cpu().contiguous().numpy().astype("<f4", copy=False)
    return [hashlib.sha256(row.data).digest() for row in rows]


def abridged(digests: Sequence[bytes]) -> tuple[tuple[str, ...], str]:
    """What a receipt keeps of the digests of its rows: the beginning of each, and the digest of all."""
    return tuple(one.hex()[:PREFIX] for one in digests), hashlib.sha256(b"".join(digests)).hexdigest()
