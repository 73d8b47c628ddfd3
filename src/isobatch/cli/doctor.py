"""`isobatch doctor`: describes this machine, and tests whether it gives the promised bits."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from isobatch.cli.model import MODEL_HELP
from isobatch.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from isobatch.cli.checks import Check
    from isobatch.kernels.registry import OpRecord

    _Found = tuple[Mapping[str, OpRecord], list[Check], str]
    """Records, what was checked, and the numerics class."""

_NOT_OF_THE_CLASS = 1


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="describe this machine, and test whether it gives the promised bits",
        description="Describes this machine, and computes the golden digests again: only a machine that "
        "gives those very bits may use the fingerprint. The first run compiles the kernels: a minute.",
    )
    parser.add_argument("--model", metavar="MODEL", help=f"print its fingerprint too: {MODEL_HELP}")
    parser.add_argument(
        "--quick", action="store_true", help="do not certify the members of the bit classes again"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: certify the GPU's kernels, ours and the libraries' (minutes, most of them compiling)",
    )
    parser.add_argument("--out", type=Path, help="keep the report, with every verdict and its reason")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Checks, then prints.

    Args:
        arguments: as `add_parser` defines them.

    Returns:
        0, or 1 if a check failed.

    Raises:
        ModelError: there is no such model.
        UnsupportedOpError, MissingDependencyError: no GPU, or no Triton.
        ConfigError: --quick on a GPU.
        IntegrityError: the inputs of a check cannot show what it is looking for.
    """
    from isobatch.cli import machine, results
    from isobatch.ops.fingerprint import NUMERICS_VERSION

    on_gpu = arguments.device == "cuda"
    fingerprint = None if arguments.model is None else _fingerprint(arguments.model, arguments.device)
    cache = machine.kernel_cache()  # before a check compiles any
    records, checks, numerics = _on_gpu(arguments) if on_gpu else _on_cpu(arguments)
    report: dict[str, Any] = {
        "ok": all(check.ok for check in checks),
        "numerics": numerics,
        "fingerprint": fingerprint,
        "numerics_version": NUMERICS_VERSION,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "threading_layer": machine.threading_layer(),
        "kernel_cache": cache,
        "ops": [
            {"name": op.name, "members": [m.name for m in op.members], "thresholds": op.thresholds}
            for op in records.values()
        ],
        "checks": [{"ok": check.ok, **asdict(check)} for check in checks],
    }
    if arguments.out is not None:
        # A file is passed on: where this machine keeps what is compiled is nobody else's business.
        results.write(arguments.out, {name: part for name, part in report.items() if name != "kernel_cache"})
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0 if report["ok"] else _NOT_OF_THE_CLASS


def _fingerprint(model: str, device: Literal["cpu", "cuda"]) -> str | None:
    from isobatch.config import EngineConfig
    from isobatch.engine.backend import identity_of

    identity = identity_of(model, EngineConfig(device=device))
    return None if identity is None else identity.fingerprint


def _on_cpu(arguments: argparse.Namespace) -> _Found:
    from isobatch.cli.checks import check_arithmetic, check_digests, check_members
    from isobatch.kernels.catalogue import RECORDS
    from isobatch.ops.fingerprint import numerics_class

    with _shown() as progress:
        progress("IEEE arithmetic")
        checks = [check_arithmetic(), check_digests(progress)]
        if not arguments.quick:
            checks.append(check_members(progress))
    return RECORDS, checks, numerics_class()


def _on_gpu(arguments: argparse.Namespace) -> _Found:
    if arguments.quick:
        raise ConfigError("doctor: on a GPU there is nothing but certification", fix="leave out --quick")
    try:
        from isobatch.cli import gpu_checks
        from isobatch.kernels.gpu.catalogue import GPU_RECORDS
        from isobatch.kernels.gpu.device import device, dtypes
        from isobatch.ops.gpu import gpu_numerics_class
    except ImportError as error:
        raise MissingDependencyError("Triton is not installed", fix="pip install isobatch[gpu]") from error
    device()
    with _shown() as progress:
        checks = gpu_checks.checks(progress)
        progress("golden digests")
        numerics = gpu_numerics_class(dtypes()[0])
    return GPU_RECORDS, checks, numerics


@contextmanager
def _shown() -> Iterator[Callable[[str], None]]:
    """Says what is being checked, while it is; in a log, line by line."""
    console = Console(stderr=True)
    hint = "the first run on a machine compiles, which takes a minute or more"
    with console.status("") as status:
        if console.is_terminal:
            yield lambda what: status.update(f"checking {what}; {hint}")
        else:
            console.print(hint, soft_wrap=True)
            yield lambda what: console.print(f"checking {what}", soft_wrap=True)


def _print(report: dict[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    cache, layer = report["kernel_cache"], report["threading_layer"]
    facts = Table("machine", _whole(), box=SIMPLE)
    for name, value in {**report["versions"], **report["hardware"]}.items():
        facts.add_row(name, str(value))
    advice = " (works, but slowly: install libgomp1)" if layer == "workqueue" else ""
    facts.add_row("threading layer", layer + advice)
    facts.add_row(
        "kernel cache", f"{cache['folder']}, {cache['compiled'] or 'none'} compiled before this run"
    )
    facts.add_row("numerics class", report["numerics"])
    if report["fingerprint"] is not None:
        facts.add_row("fingerprint", report["fingerprint"])
    ops = Table("op", "members of its bit class", "they differ around these row counts", box=SIMPLE)
    for op in report["ops"]:
        ops.add_row(op["name"], ", ".join(op["members"]), ", ".join(map(str, op["thresholds"])))
    checks = Table("check", "", _whole(), box=SIMPLE)
    for check in report["checks"]:
        said = check["summary"] if check["ok"] else "\n".join(check["failures"])
        checks.add_row(check["name"], "ok" if check["ok"] else "FAILED", said)
    for table in (facts, ops, checks):
        console.print(table)
    if report["ok"]:
        console.print(f"This machine gives the bits that {report['numerics']} promises.")
    else:
        console.print(f"This machine is not of the class {report['numerics']}: its replies have other bits.")


def _whole() -> Column:
    """A column that breaks what is too long: a path or a digest cut short would be of no use."""
    return Column(overflow="fold")
