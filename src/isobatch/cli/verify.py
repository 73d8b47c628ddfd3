"""`isobatch verify`: whether a receipt tells the truth."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isobatch.cli.model import MODEL_HELP, add_setting_options, config_from, load
from isobatch.errors import (
    ConfigError,
    FloatEnvironmentError,
    IsobatchError,
    MissingDependencyError,
    ModelError,
    OutOfMemoryError,
    ReceiptError,
    UnsupportedOpError,
)

if TYPE_CHECKING:
    from isobatch.engine.receipt import Receipt
    from isobatch.engine.verify import Verdict

_CODES = {"verified": 0, "refuted": 1, "unknown": 2}
# What keeps us from an answer, without being one.
_OBSTACLES = (
    ReceiptError,
    ModelError,
    MissingDependencyError,
    OutOfMemoryError,
    UnsupportedOpError,
    FloatEnvironmentError,
)


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="check a reply by its receipt, in one pass over it",
        description="Computes prompt and reply again in one pass, draws each token again, and compares with "
        "what the receipt says. Exit code 0: exactly what this model says; 1: it is not; 2: could not tell, "
        "because the receipt is damaged or by other numerics, or the model cannot be used.",
    )
    parser.add_argument(
        "receipt", metavar="RECEIPT", type=Path, help="a file that `generate --receipt` wrote"
    )
    parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL_HELP)
    parser.add_argument("--chunk", metavar="INT", type=int, help="tokens computed at a time; changes no bit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_setting_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verifies, prints.

    Args:
        arguments: as `add_parser` defines them.

    Returns:
        0, 1 or 2; see `add_parser`.

    Raises:
        ConfigError: a bad option or setting.
    """
    config = config_from(arguments)
    if config.kernels == "stock":
        raise ConfigError("stock kernels cannot verify a receipt", fix="leave out the kernels")
    if arguments.chunk is not None and arguments.chunk < 1:
        raise ConfigError("bad --chunk", expected="1 or more", got=arguments.chunk)
    from isobatch.engine.receipt_json import read_receipt

    try:
        receipt = read_receipt(arguments.receipt)
        options = {} if arguments.chunk is None else {"chunk": arguments.chunk}
        verdict = load(arguments.model, config).verify(receipt, **options)
    except _OBSTACLES as error:
        _print_obstacle(error, as_json=arguments.json)
        return _CODES["unknown"]
    _print(verdict, receipt, as_json=arguments.json)
    return _CODES[verdict.outcome]


def _print_obstacle(error: IsobatchError, *, as_json: bool) -> None:
    if as_json:
        said = {"type": type(error).__name__, "message": str(error)}
        print(json.dumps({"outcome": "unknown", "error": said}))
    else:
        print(f"unknown: {error}")


def _print(verdict: Verdict, receipt: Receipt, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(verdict), "fingerprint": receipt.fingerprint, "receipt": receipt.digest}))
    else:
        print(verdict)
