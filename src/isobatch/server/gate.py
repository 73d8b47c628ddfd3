"""What every request passes before a route sees it: a log line, a key, and limits of size and patience."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isobatch.server.errors import ApiError
from isobatch.server.metrics import Metrics

_LOG = logging.getLogger("isobatch.server")
BODY_TIMEOUT_S = 30.0
"""How long a client may take to send a body."""
MOST_HEADER_BYTES = 64 << 10
# Without a key: the page and what it is made of, and what probes and collectors ask.
_OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")


class Gate:
    """ASGI middleware, outermost.

    Args:
        app: what is behind it.
        keys: any of which lets a request through; none at all for an open server.
        max_body_bytes: of a request.
        metrics: what counts requests.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int, metrics: Metrics) -> None:
        self._app, self._most, self._metrics = app, max_body_bytes, metrics
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; called by the framework."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        log: dict[str, Any] = {}
        scope["isobatch"] = log  # what a route wants in the log
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            body = _Body(receive, self._most)
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            refusal = self._refusal(scope["path"], headers, size)
            if refusal is not None:
                await refusal.response()(scope, receive, sending)
                return
            try:
                await self._app(scope, body, sending)
            except ApiError as error:
                if status:
                    raise
                await error.response()(scope, receive, sending)
        finally:
            self._record(scope, status, time.monotonic() - started, log)

    def _refusal(self, path: str, headers: dict[bytes, bytes], size: int) -> ApiError | None:
        if size > MOST_HEADER_BYTES:
            said = f"the headers are larger than {MOST_HEADER_BYTES} bytes"
            return ApiError(431, "invalid_request_error", said, code="headers_too_large")
        if self._keys and path not in _OPEN and not path.startswith("/static/"):
            given = headers.get(b"authorization", b"").partition(b" ")
            right = [hmac.compare_digest(given[2].strip(), key) for key in self._keys]  # each, always
            if given[0].lower() != b"bearer" or not any(right):
                said = "send a valid API key as Authorization: Bearer KEY"
                return ApiError(401, "authentication_error", said, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            return _too_large(self._most)
        return None

    def _record(self, scope: Scope, status: int, seconds: float, log: dict[str, Any]) -> None:
        # The route's pattern, so that made-up paths make no new series; 499 where the client had gone.
        path = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(path, str(status or 499)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        client = scope.get("client") or ("unknown",)
        fields = {"method": scope["method"], "path": path, "status": status or 499, "client": client[0]}
        _LOG.info("request", extra={"fields": fields | {"ms": round(seconds * 1e3, 1)} | log})


class _Body:
    """A request's `receive`, with limits while the body comes in; afterwards it waits as long as it takes.

    Args:
        receive: the server's.
        most: bytes.
    """

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left, self._most = receive, most, most
        self._reading = True

    async def __call__(self) -> Message:
        """The next message."""
        if not self._reading:
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await self._receive()
        except TimeoutError:
            said = f"the body did not come within {BODY_TIMEOUT_S:g} seconds"
            raise ApiError(408, "invalid_request_error", said, code="body_timeout") from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_large(self._most)
        self._reading = bool(message.get("more_body"))
        return message


def _too_large(most: int) -> ApiError:
    said = f"the body is larger than {most} bytes"
    return ApiError(413, "invalid_request_error", said, code="request_too_large")
