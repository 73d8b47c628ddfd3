"""The application: routes, errors, the page, and the life of the engines' threads."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from isobatch._version import __version__
from isobatch.engine.llm import LLM
from isobatch.errors import IsobatchError
from isobatch.server import playground, routes
from isobatch.server.errors import ApiError, api_error, fields_of, from_validation
from isobatch.server.gate import Gate
from isobatch.server.metrics import Metrics
from isobatch.server.models import Served, ServerSettings
from isobatch.server.protocol import (
    AskRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from isobatch.server.routes import as_json
from isobatch.server.worker import Worker

router = APIRouter()

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/playground": AskRequest,
}
_PAGE = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "tree.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
}
# The page loads nothing from elsewhere and runs no script but its own.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@router.get("/health")
async def health() -> Response:
    """Whether the process answers at all."""
    return as_json({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether requests are accepted, and how busy the engines are: 503 unless all of them accept."""
    served: list[Served] = list(request.app.state.models.values())
    models = [
        {
            "id": one.name,
            "state": one.worker.state,
            "system_fingerprint": one.llm.fingerprint,
            "in_flight": one.worker.in_flight,
            "running": one.llm.engine.scheduler.num_running,
            "waiting": one.llm.engine.scheduler.num_waiting,
        }
        for one in served
    ]
    fine = all(one.worker.state == "ready" for one in served)
    return as_json({"status": "ready" if fine else "not ready", "models": models}, 200 if fine else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page."""
    return _static("index.html")


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    """What the page is made of."""
    if name not in _PAGE:
        raise ApiError(404, "invalid_request_error", "there is no such file")
    return _static(name)


def _static(name: str) -> Response:
    content = files("isobatch.server").joinpath("static", name).read_bytes()
    return Response(content, headers=_PAGE_HEADERS, media_type=_PAGE[name])


async def _on_own(_request: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    model = _BODIES.get(request.url.path)
    return from_validation(error.errors(), fields_of(model) if model else []).response()


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # raised while FastAPI read the body
        return error.__cause__.response()
    response = ApiError(error.status_code, "invalid_request_error", str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


def make_app(models: Mapping[str, LLM], settings: ServerSettings) -> tuple[ASGIApp, dict[str, Worker]]:
    """The application, and the workers that it starts and stops.

    Args:
        models: by the names that requests have for them; the first is the page's own.
        settings: how clients are treated.

    Returns:
        An ASGI application; the workers by model, for whoever drains them.

    Determinism:
        See `Engine`: nothing that a server does to a request has a part in its reply.
    """
    workers = {
        name: Worker(llm.engine, max_queue=settings.max_queue, timeout_s=settings.timeout_s)
        for name, llm in models.items()
    }

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        for worker in workers.values():
            worker.start()
        try:
            yield
        finally:
            for worker in workers.values():
                await worker.stop()

    app = FastAPI(
        title="isobatch",
        version=__version__,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={
            RequestValidationError: _on_validation,
            HTTPException: _on_http,
            IsobatchError: _on_own,
            ApiError: _on_own,
            Exception: _on_own,
        },
    )
    for part in (router, routes.router, playground.router):
        app.include_router(part, responses=_ERRORS)
    counted = Metrics(workers, {name: llm.fingerprint for name, llm in models.items()})
    app.state.models = {name: Served(name, llm, workers[name]) for name, llm in models.items()}
    app.state.metrics, app.state.started = counted, int(time.time())
    described = app.openapi
    app.openapi = lambda: _without_422(described())  # type: ignore[method-assign]
    return Gate(app, settings.keys, settings.max_body_bytes, counted), workers


def _error_schema() -> dict[str, Any]:
    text = {"type": "string"}
    optional = {"anyOf": [text, {"type": "null"}]}
    fields = {"message": text, "type": text, "param": optional, "code": optional}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    return {"application/json": {"schema": schema}}


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": said, "content": _error_schema()}
    for status, said in {
        400: "The request cannot be served; the message says why",
        401: "No valid API key",
        404: "No such model",
        408: "The body did not come",
        413: "The body is too large",
        429: "Too many requests are waiting",
        500: "The server failed",
        503: "The engine is down or shutting down",
        504: "Not done in time",
    }.items()
}


def _without_422(described: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's own word for a bad body, for which we answer 400 as OpenAI does."""
    for operations in described["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return described
