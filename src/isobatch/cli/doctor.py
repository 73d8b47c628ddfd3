"""`isobatch doctor`: describes this machine, and tests whether it gives the promised bits."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from isobatch.cli.model import MODEL_HELP

if TYPE_CHECKING:
    from isobatch.cli.checks import Check

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
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Checks, then prints.

    Args:
        arguments: as `add_parser` defines them.

    Returns:
        0, or 1 if a check failed.

    Raises:
        ModelError: there is no such model.
        IntegrityError: the inputs of a check cannot show what it is looking for.
    """
    from isobatch.cli import machine
    from isobatch.kernels.catalogue import RECORDS
    from isobatch.ops.fingerprint import NUMERICS_VERSION, numerics_class

    fingerprint = None if arguments.model is None else _fingerprint(arguments.model)
    cache = machine.kernel_cache()  # before a check compiles any
    checks = _checked(quick=arguments.quick)
    report: dict[str, Any] = {
        "ok": all(check.ok for check in checks),
        "numerics": numerics_class(),
        "fingerprint": fingerprint,
        "numerics_version": NUMERICS_VERSION,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "threading_layer": machine.threading_layer(),
        "kernel_cache": cache,
        "ops": [
            {"name": op.name, "members": [m.name for m in op.members], "thresholds": op.thresholds}
            for op in RECORDS.values()
        ],
        "checks": [{"ok": check.ok, **asdict(check)} for check in checks],
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0 if report["ok"] else _NOT_OF_THE_CLASS


def _fingerprint(model: str) -> str | None:
    from isobatch.config import EngineConfig
    from isobatch.engine.backend import identity_of

    identity = identity_of(model, EngineConfig())
    return None if identity is None else identity.fingerprint


def _checked(*, quick: bool) -> list[Check]:
    from isobatch.cli.checks import check_arithmetic, check_digests, check_members

    with Console(stderr=True).status("") as status:

        def progress(what: str) -> None:
            status.update(f"checking {what}; the first run on a machine compiles, which takes a minute")

        progress("IEEE arithmetic")
        checks = [check_arithmetic(), check_digests(progress)]
        if not quick:
            checks.append(check_members(progress))
    return checks


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
