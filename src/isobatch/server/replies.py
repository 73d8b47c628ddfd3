"""Replies and chunks in OpenAI's form.

Equal requests get replies that are equal in every field but `id` and `created`; so nothing is in them that
the load has a part in, such as how much of a prompt was cached. They are plain dicts: a stream makes one for
each token of each completion, and validating what we made ourselves would be its largest cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isobatch.engine.output import Completion, Reply, TokenLogProbs
from isobatch.engine.request import FinishReason
from isobatch.engine.tokenizer import Tokenizer
from isobatch.server.job import Piece

Dict = dict[str, Any]

_counter = itertools.count()
_STARTED = time.time_ns()


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of a reply have in common.

    Args:
        model: as the request named it.
        fingerprint: of the numerics; None with stock kernels.
        seed: with which the request can be repeated.
        prefix: of the id.
    """

    model: str
    fingerprint: str | None
    seed: int
    prefix: str
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        # A time and a number: unique enough, and no randomness is needed for it.
        object.__setattr__(self, "id", f"{self.prefix}-{_STARTED:x}-{next(_counter)}")
        object.__setattr__(self, "created", int(time.time()))

    def body(self, kind: str, **fields: Any) -> Dict:
        """A reply or chunk with these fields in it."""
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return named | {"system_fingerprint": self.fingerprint} | fields

    def extension(self, replies: Sequence[Reply] = ()) -> Dict:
        """What isobatch adds: the seed, and the receipts of all choices, in their order, if they have any."""
        made = [c.receipt.as_dict() for reply in replies for c in reply.completions if c.receipt is not None]
        return {"seed": self.seed} | ({"receipts": made} if made else {})


def usage(prompt_tokens: int, completion_tokens: int) -> Dict:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_of(replies: Sequence[Reply]) -> Dict:
    """The count of a whole job; a prompt counts once however many completions it has."""
    made = sum(len(c.token_ids) for reply in replies for c in reply.completions)
    return usage(sum(len(reply.prompt_token_ids) for reply in replies), made)


def reason(finish: FinishReason | None) -> str | None:
    """OpenAI's word, which is ours where a reply has ended well."""
    return None if finish is None else finish.value


class Offsets:
    """Where in the text of a completion each of its tokens begins, in characters.

    Args:
        tokenizer: of the model.
        start: where the first begins.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._detokenizer, self._at = tokenizer.incremental(), start

    def next(self, token: int) -> int:
        """The offset of one more token."""
        here = self._at
        self._at += len(self._detokenizer.push(token))
        return here


class Words:
    """Tokens as text, for log-probabilities.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        """A token's text; where it is not whole characters, its bytes as OpenAI writes them."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def chat(self, entries: Sequence[TokenLogProbs] | None) -> Dict | None:
        """Log-probabilities as the chat endpoint has them."""
        if entries is None:
            return None
        content = []
        for entry in entries:
            tops = [self._chat_token(token, value) for token, value in entry.top]
            content.append(self._chat_token(entry.token_id, entry.log_prob) | {"top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _chat_token(self, token: int, value: float) -> Dict:
        raw = self.tokenizer.token_bytes(token)
        return {"token": self.text(token), "logprob": value, "bytes": list(raw)}

    def completion(
        self, entries: Sequence[TokenLogProbs] | None, offsets: Offsets, unscored: Sequence[int] = ()
    ) -> Dict | None:
        """Log-probabilities as the completions endpoint has them.

        Args:
            entries: of the tokens, or None if they were not asked for.
            offsets: tells where each token begins.
            unscored: tokens before them that have none: the first of a prompt.
        """
        if entries is None:
            return None
        tokens = [*unscored, *(entry.token_id for entry in entries)]
        # The chosen token is among the top ones even if it was not that likely, as with OpenAI.
        tops = [{self.text(t): v for t, v in (*e.top, (e.token_id, e.log_prob))} for e in entries]
        nothing: list[None] = [None] * len(unscored)
        return {
            "tokens": [self.text(token) for token in tokens],
            "token_logprobs": [*nothing, *(entry.log_prob for entry in entries)],
            "top_logprobs": [*nothing, *tops],
            "text_offset": [offsets.next(token) for token in tokens],
        }


def chat_reply(head: Head, reply: Reply, words: Words) -> Dict:
    """The body of a chat reply."""
    choices = [
        {
            "index": c.index,
            "message": {"role": "assistant", "content": c.text, "refusal": None},
            "logprobs": words.chat(c.log_probs),
            "finish_reason": reason(c.finish_reason),
        }
        for c in reply.completions
    ]
    return head.body(
        "chat.completion", choices=choices, usage=usage_of([reply]), isobatch=head.extension([reply])
    )


def chat_chunk(head: Head, piece: Piece, words: Words, *, first: bool) -> Dict:
    """A chunk of a chat reply. The first of each completion also says who speaks."""
    delta = {"content": piece.text} if piece.text or first else {}
    choice = {
        "index": piece.index,
        "delta": {"role": "assistant"} | delta if first else delta,
        "logprobs": words.chat(piece.log_probs),
        "finish_reason": reason(piece.finish),
    }
    return head.body("chat.completion.chunk", choices=[choice])


def completion_reply(
    head: Head, replies: Sequence[Reply], words: Words, *, echoes: Sequence[str] | None, silent: bool
) -> Dict:
    """The body of a completions reply.

    Args:
        head: of it.
        replies: one per prompt.
        words: of the model.
        echoes: the prompts as texts, if each text is to begin with its prompt.
        silent: whether the one token that was made is not shown, because none was asked for.
    """
    choices: list[Dict] = []
    for at, reply in enumerate(replies):
        echo = None if echoes is None else echoes[at]
        for completion in reply.completions:
            choices.append(_choice(len(choices), reply, completion, words, echo=echo, silent=silent))
    counted = usage_of(replies)
    if silent:
        counted = usage(counted["prompt_tokens"], 0)
    return head.body("text_completion", choices=choices, usage=counted, isobatch=head.extension(replies))


def _choice(
    index: int, reply: Reply, completion: Completion, words: Words, *, echo: str | None, silent: bool
) -> Dict:
    text, entries = completion.text, completion.log_probs
    if silent:
        text, entries = "", None if entries is None else ()
    unscored: Sequence[int] = ()
    if echo is not None and entries is not None:
        entries = (*(reply.prompt_log_probs or ()), *entries)
        unscored = reply.prompt_token_ids[:1]
    return {
        "index": index,
        "text": (echo or "") + text,
        "logprobs": words.completion(entries, Offsets(words.tokenizer), unscored),
        "finish_reason": FinishReason.LENGTH.value if silent else reason(completion.finish_reason),
    }


def completion_chunk(head: Head, index: int, text: str, logprobs: Dict | None, finish: str | None) -> Dict:
    """A chunk of a completions reply."""
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return head.body("text_completion", choices=[choice])


def usage_chunk(head: Head, kind: str, replies: Sequence[Reply]) -> Dict:
    """The last chunk of a stream that counts tokens."""
    return head.body(kind, choices=[], usage=usage_of(replies))
