"""Bodies in which no field is given twice: readers disagree which one counts, and Python keeps the last."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from isobatch.server.errors import bad_request


class _Read(Request):
    """A request that remembers which fields its body names twice."""

    twice: str | None = None

    async def json(self) -> Any:
        """The body, read once."""
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), object_pairs_hook=self._object)
        return self._json

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                self.twice = name
            fields[name] = value
        return fields


class OnceRoute(APIRoute):
    """A route that refuses such a body. What cannot be read is left to those who say why."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Reads the body first."""
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            read = _Read(request.scope, request.receive)
            if request.method == "POST":
                try:
                    await read.json()
                except (ValueError, RecursionError, ClientDisconnect):
                    return await handle(read)
            if read.twice is not None:
                raise bad_request(f"the field {read.twice!r:.100} is given twice", read.twice, "invalid_json")
            return await handle(read)

        return read_and_handle
