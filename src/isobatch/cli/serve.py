"""`isobatch serve`: an OpenAI server, and a page to try it on."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isobatch.cli.model import MODEL_HELP, add_setting_options, config_from, load
from isobatch.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from isobatch.config import EngineConfig
    from isobatch.engine.llm import LLM

_STOCK = "-stock"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model to any OpenAI client, and a page to see the promise kept",
        description="Serves /v1/chat/completions, /v1/completions and what belongs to them, and a page at /. "
        "Needs the extra [server].",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_setting_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default 8000)")
    parser.add_argument("--served-model-name", metavar="NAME", help="in requests; by default MODEL's own")
    parser.add_argument(
        "--api-key-file", type=Path, help="a key per line; requests need one of them as a bearer token"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="a key, repeatable; a file is better, since others may see the words of a command",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=2048,
        help="completions that may wait beside those that can run; more get 429 (default 2048)",
    )
    parser.add_argument(
        "--request-timeout", type=float, default=600.0, help="seconds, waiting included (default 600)"
    )
    parser.add_argument(
        "--max-body-bytes", type=int, default=4 << 20, help="the largest request (default 4194304)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        help="seconds that requests in flight may go on once the server is told to stop (default 30)",
    )
    parser.add_argument(
        "--compare-stock",
        action="store_true",
        help=f"also serve NAME{_STOCK}, the same weights with torch's own kernels, for the page's switch",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is told to stop.

    Returns:
        0.

    Raises:
        ConfigError: a bad setting, or an address that cannot be had.
        MissingDependencyError: FastAPI, uvicorn or prometheus_client is not installed.
        ModelError: the model cannot be used.
    """
    try:
        from isobatch.server import logs
        from isobatch.server import run as server
        from isobatch.server.models import ServerSettings
    except ImportError as error:
        raise MissingDependencyError(f"{error}", fix="pip install isobatch[server]") from error
    settings = ServerSettings(
        keys=(*arguments.api_key, *_keys(arguments.api_key_file)),
        max_queue=arguments.max_queue,
        timeout_s=arguments.request_timeout,
        max_body_bytes=arguments.max_body_bytes,
    )
    if not 0 <= arguments.grace < float("inf"):
        raise ConfigError("bad --grace", expected="0 or more seconds", got=arguments.grace)
    config = config_from(arguments)
    if arguments.compare_stock and config.kernels == "stock":
        raise ConfigError("--compare-stock beside stock kernels", fix="leave out --kernels stock")
    if arguments.compare_stock and config.device == "cuda" and config.kv_cache_bytes is None:
        fix = "--set kv_cache_bytes=N, which each of the two gets"
        raise ConfigError("two models on a GPU, and a KV cache of all that one of them leaves", fix=fix)
    if config.load == "random":
        raise ConfigError("a model with random weights has no tokenizer to serve with", fix="leave out load")
    # Everything that can be wrong without a model is found before one is loaded; so is a busy address.
    with contextlib.closing(server.listen(arguments.host, arguments.port)) as taken:
        models = _load(arguments, config)
        server.allow_many_connections()
        logs.configure()
        host, port = taken.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        names = " and ".join(map(repr, models))
        print(f"isobatch: serving {names} at http://{address}:{port}", file=sys.stderr, flush=True)
        asyncio.run(server.Server(models, settings, arguments.grace).serve([taken]))
    return 0


def _load(arguments: argparse.Namespace, config: EngineConfig) -> dict[str, LLM]:
    """The models by their names in requests, ready."""
    name = arguments.served_model_name or _name(arguments.model)
    models = {name: load(arguments.model, config)}
    if arguments.compare_stock:
        # Without a prefix cache, since copies of a prompt that share its keys hardly compute anything under
        # load. Ours need no such help.
        stock = replace(config, kernels="stock", prefix_cache=False)
        models[f"{name}{_STOCK}"] = load(arguments.model, stock)
    for llm in models.values():
        _warm_up(llm)
    return models


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", got=error) from error
    if not keys:
        raise ConfigError(f"no key in {path}", fix="write one per line, or leave out --api-key-file")
    return keys


def _name(model: str) -> str:
    """What MODEL is called in requests: a path's last part, since paths are nobody's business."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _warm_up(llm: LLM) -> None:
    """Compiles what is not in the cache yet, so that the first request does not wait for it."""
    from isobatch.engine.sampling_params import SamplingParams

    llm.generate([[0]], SamplingParams(max_tokens=2, seed=0, top_p=0.9, logprobs=1, repetition_penalty=1.1))
