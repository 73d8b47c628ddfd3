"""OpenAI's endpoints."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from isobatch.engine.output import Reply
from isobatch.engine.tokenizer import Tokenizer
from isobatch.errors import EngineDownError
from isobatch.server import replies
from isobatch.server.body import OnceRoute
from isobatch.server.errors import bad_request
from isobatch.server.job import Job, Piece
from isobatch.server.models import Served, pick, seeded
from isobatch.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from isobatch.server.replies import Dict, Head, Offsets
from isobatch.server.stream import EventStream, Jobs, whole

router = APIRouter(route_class=OnceRoute)


def as_json(body: object, status: int = 200) -> Response:
    """A response; ASCII only, as OpenAI's, so that no half of a surrogate pair can break it."""
    return Response(json.dumps(body, separators=(",", ":")), status, media_type="application/json")


@dataclass(slots=True)
class _Exchange:
    """A request and what is told about it in log and metrics.

    Args:
        request: the request.
        served: its model.
        job: what it asked for.
        head: of its reply.
        given: for each prompt what it was made from, as for `Reply.asked_as`.
    """

    request: Request
    served: Served
    job: Job
    head: Head
    given: list[dict[str, Any]]

    def __post_init__(self) -> None:
        prompts = self.job.prompts
        self.request.scope["isobatch"] |= {
            "id": self.head.id,
            "model": self.served.name,
            "stream": self.job.streaming,
            "completions": self.job.sequences,
            "prompt_tokens": sum(map(len, prompts)),
        }

    def done(self) -> None:
        """Counts what the job has come to."""
        counted = replies.usage_of(list(self.job.replies.values()))
        metrics = self.request.app.state.metrics
        metrics.prompt_tokens.inc(counted["prompt_tokens"])
        metrics.reply_tokens.inc(counted["completion_tokens"])
        self.request.scope["isobatch"]["reply_tokens"] = counted["completion_tokens"]

    async def replies(self) -> list[Reply]:
        """All of them, once they are there.

        Raises:
            EngineDownError: the client has gone away; nobody will read this.
            ServerError, RequestError: as `Job.pieces`.
        """
        if not await whole(self.request, self.job):
            raise EngineDownError("the client has gone away")
        self.done()
        return self.asked()

    def asked(self) -> list[Reply]:
        """The finished replies, in the order of the prompts, with receipts that say what was asked."""
        replies = [self.job.replies[at] for at in range(len(self.job.prompts))]
        return [reply.asked_as(**given) for reply, given in zip(replies, self.given, strict=True)]

    async def events(self, kind: str, chunks: Any, *, wants_usage: bool) -> AsyncIterator[list[Dict]]:
        """Chunks as they come, then the count of tokens if it is wanted.

        Args:
            kind: OpenAI's `object`.
            chunks: makes one of a piece.
            wants_usage: whether to count.
        """
        started, begun = time.monotonic(), False
        nothing: Dict = {"usage": None} if wants_usage else {}
        async for pieces in self.job.pieces():
            bodies = [chunks(piece) | nothing for piece in pieces]
            if not begun:
                begun = True
                self.request.app.state.metrics.first_piece_seconds.observe(time.monotonic() - started)
                bodies[0]["isobatch"] = self.head.extension()
            yield bodies
        if not self.job.closed:
            self.done()
            if self.job.params.receipt:
                yield [self.head.body(kind, choices=[], isobatch=self.head.extension(self.asked())) | nothing]
            if wants_usage:
                yield [replies.usage_chunk(self.head, kind, list(self.job.replies.values()))]


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Continues a conversation."""
    served = pick(request.app.state.models, body.model)
    messages = [message.plain() for message in body.messages]
    prompt = await served.encode_chat(messages)
    params = seeded(body.params(served.room(len(prompt))))
    job = served.worker.submit([prompt], params, streaming=bool(body.stream))
    head = Head(served.name, served.llm.fingerprint, params.seed or 0, "chatcmpl")
    exchange = _Exchange(request, served, job, head, [{"messages": messages}])
    if not body.stream:
        (reply,) = await exchange.replies()
        return as_json(replies.chat_reply(head, reply, served.words))
    begun: set[int] = set()

    def chunk(piece: Piece) -> Dict:
        first = piece.index not in begun
        begun.add(piece.index)
        return replies.chat_chunk(head, piece, served.words, first=first)

    events = exchange.events("chat.completion.chunk", chunk, wants_usage=body.wants_usage)
    return EventStream(Jobs(job), events)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues texts or token ids."""
    served = pick(request.app.state.models, body.model)
    given = body.prompts
    if not given:
        raise bad_request("a list of prompts without any", "prompt", "invalid_value")
    params = seeded(body.params())
    prompts = [await served.encode(p) if isinstance(p, str) else p for p in given]
    job = served.worker.submit(prompts, params, streaming=bool(body.stream))
    head = Head(served.name, served.llm.fingerprint, params.seed or 0, "cmpl")
    asked = [{"prompt": p} if isinstance(p, str) else {} for p in given]
    exchange = _Exchange(request, served, job, head, asked)
    tokenizer = served.llm.tokenizer
    echoes = [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in given]
    if not body.stream:
        finished = await exchange.replies()
        silent = body.max_tokens == 0
        shown = echoes if body.echo else None
        return as_json(replies.completion_reply(head, finished, served.words, echoes=shown, silent=silent))
    choices = _Choices(served, params.n, echoes if body.echo else [""] * len(given))

    def chunk(piece: Piece) -> Dict:
        index, text, offsets = choices.of(piece)
        scored = served.words.completion(piece.log_probs, offsets)
        return replies.completion_chunk(head, index, text, scored, replies.reason(piece.finish))

    events = exchange.events("text_completion", chunk, wants_usage=body.wants_usage)
    return EventStream(Jobs(job), events)


class _Choices:
    """Numbers the choices of a stream, and remembers how far each has come.

    Args:
        served: the model.
        n: completions of each prompt.
        echoes: what the text of each prompt's choices begins with.
    """

    def __init__(self, served: Served, n: int, echoes: list[str]) -> None:
        self._tokenizer: Tokenizer = served.llm.tokenizer
        self._n, self._echoes = n, echoes
        self._offsets: dict[int, Offsets] = {}

    def of(self, piece: Piece) -> tuple[int, str, Offsets]:
        """A piece's choice, its text, and where its tokens begin."""
        index, text = piece.prompt * self._n + piece.index, piece.text
        if index not in self._offsets:
            echo = self._echoes[piece.prompt]
            self._offsets[index] = Offsets(self._tokenizer, len(echo))
            text = echo + text
        return index, text, self._offsets[index]


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """What there is."""
    models = request.app.state.models
    return as_json({"object": "list", "data": [_model(request, name) for name in models]})


@router.get("/v1/models/{model:path}")
async def get_model(model: str, request: Request) -> Response:
    """One of them."""
    return as_json(_model(request, pick(request.app.state.models, model).name))


def _model(request: Request, name: str) -> Dict:
    served: Served = request.app.state.models[name]
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "isobatch",
        "system_fingerprint": served.llm.fingerprint,
        "max_model_len": served.llm.engine.max_context,
    }


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text or conversation."""
    served = pick(request.app.state.models, body.model)
    if body.messages is not None:
        ids = await served.encode_chat([message.plain() for message in body.messages])
    else:
        ids = await served.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    return as_json({"tokens": ids, "count": len(ids), "max_model_len": served.llm.engine.max_context})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    served = pick(request.app.state.models, body.model)
    return as_json({"prompt": served.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)})
