"""Whether a receipt tells the truth: one prefill pass over prompt and reply, and every token drawn again.

Nothing in the receipt is believed. Decode equals prefill, so the rows of logits that the tokens were sampled
from come out of a forward pass over all of them at once; from these rows each token is sampled anew by the
engine's own sampler, and the reply's end and text are worked out by the engine's own transcript.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch

from isobatch.engine import sampler
from isobatch.engine.engine import Engine
from isobatch.engine.inputs import require_tokens
from isobatch.engine.receipt import PREFIX, Receipt, row_digests
from isobatch.engine.request import Sequence
from isobatch.engine.transcript import Transcript
from isobatch.errors import ConfigError, ModelError, RequestError
from isobatch.models.inputs import Batch

CHUNK = 256
"""Tokens computed at a time by default: enough for full speed, while the logits of a chunk stay small."""

# What a receipt says of the reply as a whole: its attribute, and its name in the written form.
_WHOLE = {
    "finish_reason": "completion.finish_reason",
    "stop_reason": "completion.stop_reason",
    "text": "completion.text",
    "logits": "logits.digest",
    "params": "params",
}


class Outcome(StrEnum):
    """What became of a verification."""

    VERIFIED = "verified"
    """Exactly what this model says."""
    REFUTED = "refuted"
    """Not what this model says."""
    UNKNOWN = "unknown"
    """Not to be told here: other numerics, or another version."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying a receipt came to.

    Args:
        outcome: the answer.
        field: the first thing in the receipt that is not so, such as "completion.token_ids"; None if all is.
        token: the first token of the reply that differs, from 0, where it is one.
        said: what the receipt has there.
        found: what this model has.
        note: what that means, in a few words.
    """

    outcome: Outcome
    field: str | None = None
    token: int | None = None
    said: object = None
    found: object = None
    note: str = ""

    def __str__(self) -> str:
        where = "" if self.field is None else f": {self.field}"
        where += "" if self.token is None else f", token {self.token}"
        differ = ""
        if self.field is not None:
            differ = f": the receipt has {reprlib.repr(self.said)}, this model {reprlib.repr(self.found)}"
        return f"{self.outcome.value}{where}{differ}" + (f" ({self.note})" if self.note else "")


def verify(engine: Engine, receipt: Receipt, *, chunk: int = CHUNK) -> Verdict:
    """Compares a receipt with what this model says to the same request.

    Args:
        engine: of the model. Requests in flight are not disturbed: the pass has a KV cache of its own, beside
            the engine's, for one sequence.
        receipt: from anywhere.
        chunk: how many tokens to compute at a time.

    Returns:
        VERIFIED if and only if `engine`, asked the request of the receipt, would give this very receipt.

    Raises:
        ConfigError: the chunk is below 1, or the kernels are stock ones, which cannot verify anything.
        FloatEnvironmentError, ForkedProcessError: as `Engine.require_ieee`.

    Determinism:
        A function of the receipt, the weights, the tokenizer and the numerics class; not of the chunk.
    """
    if chunk < 1:
        raise ConfigError("bad chunk", expected="1 token or more", got=chunk)
    if engine.identity is None:
        raise ConfigError("stock kernels cannot verify a receipt", fix="use certified kernels")
    engine.require_ieee()
    return (
        _other_identity(engine, receipt)
        or _other_request(engine, receipt)
        or _other_reply(engine, receipt, chunk)
        or Verdict(Outcome.VERIFIED, note=f"{len(receipt.token_ids)} tokens")
    )


def _refuted(field: str, said: object, found: object, note: str = "", token: int | None = None) -> Verdict:
    return Verdict(Outcome.REFUTED, field, token, said, found, note)


def _other_identity(engine: Engine, receipt: Receipt) -> Verdict | None:
    """Where the receipt is by another model, or by numerics that are not here to be asked."""
    ours, theirs = engine.identity, receipt.identity
    for name, why in (("numerics", "other arithmetic"), ("version", "another version of isobatch")):
        if (said := getattr(theirs, name)) != (found := getattr(ours, name)):
            note = f"{why}: verify where it is the same"
            return Verdict(Outcome.UNKNOWN, f"identity.{name}", None, said, found, note)
    for name, why in (("weights", "other weights"), ("tokenizer", "another tokenizer or chat template")):
        if (said := getattr(theirs, name)) != (found := getattr(ours, name)):
            return _refuted(f"identity.{name}", said, found, why)
    return None


def _other_request(engine: Engine, receipt: Receipt) -> Verdict | None:
    """Where no engine with this model would take this request, or its tokens are not those of its text."""
    tokenizer, model = engine.tokenizer, engine.decoder.config
    prompt, params = receipt.prompt_token_ids, receipt.params
    try:
        require_tokens(prompt, params, model.vocab_size, has_text=tokenizer is not None)
    except RequestError as error:
        return _refuted("request", "such a request", f"refused: {error}")
    if (limit := len(prompt) + params.max_tokens) > model.context_length:
        return _refuted("params.max_tokens", limit, model.context_length, "tokens, prompt included")
    try:
        if receipt.prompt is not None:
            encoded = None if tokenizer is None else tokenizer.encode(receipt.prompt)
        elif receipt.messages is not None:
            encoded = None if tokenizer is None else tokenizer.encode_chat(receipt.messages)
        else:
            return None
    except (RequestError, ModelError) as error:
        return _refuted("prompt", "such a prompt", f"refused: {error}")
    if encoded is None or tuple(encoded) != prompt:
        return _refuted("prompt.token_ids", list(prompt), encoded, "the tokens of the prompt's text")
    return None


def _other_reply(engine: Engine, receipt: Receipt, chunk: int) -> Verdict | None:
    """The first token that differs, by its logits, its choice or the reply's end; then the reply's words."""
    tokens, params = receipt.token_ids, receipt.params
    vocabulary, limit = engine.decoder.config.vocab_size, len(receipt.prompt_token_ids) + params.max_tokens
    strange = next((at for at, token in enumerate(tokens) if token >= vocabulary), len(tokens))
    # Beyond either there is nothing to compute: the token is refuted, or the reply is over.
    checked = min(strange + 1, params.max_tokens, len(tokens))
    told = Transcript(_state(receipt, 0), engine.tokenizer.incremental() if engine.tokenizer else None)
    at = 0
    for logits in _forward(engine, receipt, checked, chunk):
        states = [_state(receipt, at + row) for row in range(len(logits))]
        chosen = sampler.choose(engine.decoder.ops, logits, states)
        for digest, token in zip(row_digests(logits), chosen, strict=True):
            if (found := digest.hex()[:PREFIX]) != (row := receipt.rows[at]):
                return _refuted("logits.rows", row, found, "digest of the logits", at)
            if token != tokens[at]:
                return _refuted("completion.token_ids", tokens[at], token, "equal logits, another choice", at)
            at += 1
            told.row_digests.append(digest)
            told.sequence.computed = len(told.sequence)
            told.sequence.append(token)
            reason = told.push(token, engine.eos_token_ids, limit)
            if (reason is None) is (at == len(tokens)):
                over = "the reply goes on after it" if reason is None else "the reply is over with it"
                return _refuted("completion.token_ids", len(tokens), over, "length of the reply", at - 1)
            told.sequence.finish_reason = reason
    ours = told.receipt(receipt.identity, limit)
    for name, written in _WHOLE.items():
        if (said := getattr(receipt, name)) != (had := getattr(ours, name)):
            return _refuted(written, said, had)
    return None


def _state(receipt: Receipt, tokens: int) -> Sequence:
    """The completion as it was with so many tokens sampled."""
    params, prompt = receipt.params, receipt.prompt_token_ids
    sequence = Sequence(id=0, prompt_ids=prompt, params=params, seed=params.seed or 0, arrival=0)
    sequence.output_ids = list(receipt.token_ids[:tokens])
    return sequence


def _forward(engine: Engine, receipt: Receipt, tokens: int, chunk: int) -> Iterator[torch.Tensor]:
    """The logits that the first tokens of the reply were sampled from, float32 [S, V], a chunk at a time."""
    decoder, ops = engine.decoder, engine.decoder.ops
    known = (*receipt.prompt_token_ids, *receipt.token_ids[: tokens - 1])
    first = len(receipt.prompt_token_ids) - 1
    table = list(range(-(-len(known) // ops.page)))
    caches = decoder.kv_caches(len(table))
    for start in range(0, len(known), chunk):
        stop = min(start + chunk, len(known))
        places = list(range(start, stop))  # the block table is the identity, so slots are positions
        rows = ops.paged_rows([0, stop - start], [stop], [table], places)
        sampled = [place - start for place in places if place >= first]
        batch = Batch(ops.tensor(list(known[start:stop])), ops.tensor(places), rows, ops.tensor(sampled))
        logits = decoder(batch, caches)
        if sampled:
            yield logits
