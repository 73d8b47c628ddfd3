"""The `isobatch` command: subcommands, errors, exit codes.

exit codes:
    0  success
    1  the promise was broken, or a check failed
    2  the command, a setting or a request cannot be honoured (ConfigError, RequestError)
    3  the model or the machine cannot be used (ModelError, OutOfMemoryError, StepMemoryError, DeviceError,
     MissingDependencyError, UnsupportedOpError)
    4  an internal error, worth a report (IntegrityError, KernelError, any other exception)
  130  interrupted
  141  whoever read the output went away
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from isobatch._version import __version__
from isobatch.cli import bench, demo, doctor, generate, plot, serve, tune, verify
from isobatch.cli.parser import Parser
from isobatch.errors import (
    ConfigError,
    DeviceError,
    IsobatchError,
    MissingDependencyError,
    ModelError,
    OutOfMemoryError,
    RequestError,
    StepMemoryError,
    UnsupportedOpError,
)

# Each module has add_parser(subparsers), for a subcommand of this name, and run(arguments) -> exit code.
# What takes long to import, torch above all, they import in run, so that --help answers at once.
_COMMANDS: dict[str, ModuleType] = {
    "generate": generate,
    "serve": serve,
    "verify": verify,
    "demo": demo,
    "tune": tune,
    "bench": bench,
    "plot": plot,
    "doctor": doctor,
}

_CODES: dict[type[IsobatchError], int] = {
    ConfigError: 2,
    StepMemoryError: 3,
    RequestError: 2,
    ModelError: 3,
    OutOfMemoryError: 3,
    DeviceError: 3,
    MissingDependencyError: 3,
    UnsupportedOpError: 3,
}
_UNUSABLE, _INTERNAL, _INTERRUPTED, _NO_READER = 3, 4, 130, 141
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `isobatch`; those of the process by default.

    Returns:
        The exit code; see the module.

    Raises:
        SystemExit: after --help and --version.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("isobatch: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return _NO_READER
    except OSError as error:
        if error.errno not in _NO_ROOM:
            traceback.print_exc()
            return _INTERNAL
        _discard_output()
        print(f"isobatch: the output cannot be written: {error.strerror}", file=sys.stderr)
        return _UNUSABLE
    except Exception:  # noqa: BLE001 - left to Python it would exit with 1, which means a broken promise
        traceback.print_exc()
        return _INTERNAL


def _discard_output() -> None:
    """Python flushes stdout once more as it exits, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: Sequence[str]) -> int:
    try:
        arguments = _parser().parse_args(words)
        return int(_COMMANDS[arguments.command].run(arguments))
    except IsobatchError as error:
        print(f"isobatch: {error}", file=sys.stderr)
        # Looked for in the words, because an error in them leaves no parsed arguments to ask.
        if "--json" in words:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        return next((code for kind, code in _CODES.items() if isinstance(error, kind)), _INTERNAL)
    finally:
        sys.stdout.flush()  # a reader that went away is noticed here, not while Python shuts down


def _parser() -> Parser:
    parser = Parser(
        prog="isobatch",
        description="LLM inference that gives the same prompt the same bits, whatever else the machine does.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"isobatch {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS.values():
        command.add_parser(subparsers)
    return parser
