"""Listens until it is told to stop, and then finishes what it has begun."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Mapping

import uvicorn

from isobatch.engine.llm import LLM
from isobatch.errors import ConfigError
from isobatch.server.app import make_app
from isobatch.server.gate import MOST_HEADER_BYTES
from isobatch.server.models import ServerSettings

# What a job's failure may need after the grace period to reach its client.
_LAST_WORDS_S = 5
_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """An address to serve on, taken before a model is loaded, so that a busy one is noticed at once.

    Args:
        host: a name or address.
        port: 0 for any that is free.

    Raises:
        ConfigError: it cannot be had.
    """
    if not 0 <= port <= 0xFFFF:  # which the system would take modulo 2**16
        raise ConfigError(f"cannot listen on port {port}", expected="0 to 65535", got=port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family, kind)) as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            return taken.dup()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}", got=error, fix="try another --port") from error


def allow_many_connections() -> None:
    """Raises the soft limit of open files to the hard one: a connection is one, and the default is 1,024."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Server(uvicorn.Server):
    """uvicorn, except that on its way down the engines finish what they have, for a while.

    Args:
        models: by name.
        settings: how clients are treated.
        grace_s: how long requests in flight may go on once the server is told to stop.
    """

    def __init__(self, models: Mapping[str, LLM], settings: ServerSettings, grace_s: float) -> None:
        app, self.workers = make_app(models, settings)
        self._grace_s = grace_s
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                # h11 gives up on headers that do not end; uvicorn's other parser has no such limit.
                http="h11",
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                ws="none",
                timeout_graceful_shutdown=int(grace_s) + _LAST_WORDS_S,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after a signal."""
        for worker in self.workers.values():
            worker.drain(self._grace_s)
        await super().shutdown(sockets)
