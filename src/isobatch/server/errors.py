"""Every failure as OpenAI's error body: {"error": {"message", "type", "param", "code"}}.

Messages of our own exceptions are for users, and are passed on. Anything else says that it is an error of the
server and no more: neither a path nor a line of the source leaves the process.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from starlette.responses import Response

from isobatch.errors import (
    CapacityError,
    DeadlineError,
    EngineDownError,
    InvalidSamplingError,
    NonFiniteLogitsError,
    PromptError,
    QueueFullError,
    RequestError,
    StepMemoryError,
    TokenizerError,
)

RETRY_AFTER_S = 1
_LONGEST_MESSAGE = 1000


@dataclass(eq=False)
class ApiError(Exception):
    """A failure as a client sees it.

    Args:
        status: of HTTP.
        kind: OpenAI's `type`.
        message: for people.
        param: the field at fault, if it is one.
        code: for programs.
    """

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        message = self.message
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As a whole HTTP response."""
        headers = {}
        if self.status == 429:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # ASCII only: what a client sent, lone surrogates included, may be quoted in the message.
        return Response(json.dumps(self.body()), self.status, headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, "invalid_request_error", message, param, code)


_NAMED = re.compile(r"sampling parameter '(\w+)'")
_KINDS: list[tuple[type[Exception], int, str, str | None]] = [
    (CapacityError, 400, "invalid_request_error", "context_length_exceeded"),
    (NonFiniteLogitsError, 500, "server_error", "non_finite_logits"),
    (StepMemoryError, 503, "server_error", "out_of_memory"),
    (RequestError, 400, "invalid_request_error", None),
    (TokenizerError, 400, "invalid_request_error", None),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (DeadlineError, 504, "timeout_error", "deadline_exceeded"),
    (EngineDownError, 503, "server_error", "engine_unavailable"),
]


def api_error(error: BaseException) -> ApiError:
    """How an exception is told to a client."""
    if isinstance(error, ApiError):
        return error
    for kind, status, word, code in _KINDS:
        if isinstance(error, kind):
            param = None
            if isinstance(error, InvalidSamplingError) and (named := _NAMED.search(str(error))):
                param = named[1]
            if isinstance(error, PromptError | CapacityError):
                param = "prompt"
            if isinstance(error, PromptError) and "shorten the prompt" in str(error):
                code = "context_length_exceeded"
            return ApiError(status, word, str(error), param, code)
    return ApiError(500, "server_error", "the server failed; its log says how", code="internal_error")


def from_validation(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """What pydantic has to say about a body, in one sentence about the first field at fault.

    Args:
        errors: as pydantic lists them.
        known: the fields that the endpoint has.
    """
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        where = f"{first['ctx']['error']} at character {place[0]}"
        return bad_request(f"the body is not valid JSON: {where}", code="invalid_json")
    if first["type"] == "contradiction":
        return bad_request(first["msg"], first["ctx"]["field"], "contradiction")
    if not place:
        return bad_request("expected a JSON object; send it as application/json", code="invalid_json")
    param = str(place[0])
    if first["type"] == "extra_forbidden":
        return bad_request(_unknown(".".join(map(str, place)), known), param, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"{_path(place)!r} is missing", param, "missing_required_parameter")
    # A field that may be one of several kinds has an error for each of them.
    said = dict.fromkeys(error["msg"] for error in errors if param in error["loc"][:2])
    message = f"bad or unsupported value for {_path(place)!r}: {'; '.join(said)}"
    return bad_request(f"{message}; got {reprlib.repr(first.get('input'))}", param, "invalid_value")


def fields_of(model: type[BaseModel]) -> list[str]:
    """The fields of a body, those of objects in it as "object.field"."""
    found = []
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, BaseModel)]
        found += [name, *(f"{name}.{field}" for kind in inner for field in kind.model_fields)]
    return found


def _path(place: Sequence[str | int]) -> str:
    """As one would write it, without the kinds that pydantic tries: messages[0].content."""
    parts = [part for part in place if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _unknown(field: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(field, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown or unsupported field {field!r:.100}{hint}"
