"""`isobatch bench`: what the promise costs, as ratios measured side by side in one run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_RED_GATE = 1
_RESULTS = Path("benchmarks/results")
# What --only may name.
_PARTS = {"gpu": ("linear", "attention", "moe", "rows"), "serve": ("isobatch", "steps")}
_REPEATS = 3


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed against transformers and torch's own kernels; bits are checked first",
        description="Checks the bits, then measures; a red gate prints no number. Needs the extra [bench].",
    )
    parser.add_argument("target", choices=("cpu", "gpu", "http", "serve", "verify"), help="what to measure")
    parser.add_argument(
        "--model",
        help="a .gguf file, SmolLM2-135M-Instruct by default; of bench serve a name such as qwen3-8b (the "
        "default) or where a config.json is",
    )
    parser.add_argument(
        "--repeats", type=int, help="runs of each side; medians count (default 3, of bench serve 1)"
    )
    parser.add_argument("--out", type=Path, help=f"results file (default {_RESULTS}/TARGET.json)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[part for parts in _PARTS.values() for part in parts],
        help="of bench gpu, these parts alone (results: gpu-PART.json); of bench serve isobatch, without "
        "torch's side, or steps: what a decode step costs and where its time goes (results: serve-PART.json)",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="of bench serve, times of other engines to compare with, as scripts/serve_vllm.py keeps them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and keeps the results.

    Returns:
        0; or 1 if the bits were wrong, in which case nothing was measured.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError: repeats below 1; a model, repeats or parts for a bench that has none, or a bad file to
            compare with.
    """
    from isobatch.cli import beside, machine, results

    _check(arguments)
    sides = []
    if arguments.beside:  # read before minutes are spent
        sides = beside.read(arguments.beside, machine.gpu_name())
    path = arguments.out or _RESULTS / f"{'-'.join([arguments.target, *(arguments.only or ())])}.json"
    console = Console(stderr=True)
    with console.status("checking the bits") as status:
        tell = status.update if console.is_terminal else partial(console.print, soft_wrap=True)
        on_gpu = arguments.target in ("gpu", "serve")
        keep = partial(results.write, path)
        report = _on_gpu(arguments, tell, keep) if on_gpu else _on_cpu(arguments, tell)
    if failures := report.get("failures"):
        for failure in failures:
            console.print(failure, style="red", markup=False)
        if arguments.json:
            print(json.dumps({"gate": failures}))
        return _RED_GATE
    if sides:
        report = beside.merged(report, sides)
    results.write(path, report)
    _print(Console(stderr=arguments.json), report)
    console.print(f"kept in {path}")
    if arguments.json:
        print(json.dumps(report))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from isobatch.cli.workloads import MODEL
    from isobatch.errors import ConfigError

    target = arguments.target
    if arguments.repeats is not None and arguments.repeats < 1:
        raise ConfigError("bench: bad --repeats", expected="1 or more", got=arguments.repeats)
    if target == "gpu":
        for option in ("model", "repeats"):
            if getattr(arguments, option) is not None:
                fix = f"leave out --{option}"
                raise ConfigError(f"bench gpu has shapes and rounds of its own, no --{option}", fix=fix)
    known = _PARTS.get(target, ())
    if unknown := [part for part in arguments.only or () if part not in known]:
        expected = " or ".join(known) or "no --only"
        raise ConfigError(f"bench {target}: bad --only", expected=expected, got=" ".join(unknown))
    if target == "serve" and "steps" in (arguments.only or ()):
        for option in ("only", "beside", "repeats"):
            if getattr(arguments, option) not in (None, [], ["steps"]):
                fix = f"give --only steps without another part or --{option}"
                raise ConfigError("steps are measured by themselves, in rounds of their own", fix=fix)
    if arguments.beside and target != "serve":
        raise ConfigError("bench: --beside", expected="bench serve", got=f"bench {target}")
    if arguments.beside and arguments.model not in (None, MODEL):
        got = f"--model {arguments.model}"
        raise ConfigError("bench serve: times of another model beside", expected=MODEL, got=got)


def _on_cpu(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    from isobatch.cli import bench_cpu, bench_http, bench_verify
    from isobatch.models.locate import demo_weights

    targets: dict[str, Any] = {"cpu": bench_cpu, "http": bench_http, "verify": bench_verify}
    target = targets[arguments.target]
    model = demo_weights() if arguments.model in (None, "demo") else Path(arguments.model)
    if failures := target.gate(model):
        return {"failures": failures}
    return {"gate": "green", "figures": target.measure(model, arguments.repeats or _REPEATS, progress)}


def _on_gpu(
    arguments: argparse.Namespace,
    progress: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    from isobatch.errors import MissingDependencyError, UnsupportedOpError

    try:
        from isobatch.cli import bench_gpu, bench_serve, bench_steps
        from isobatch.cli.workloads import MODEL
        from isobatch.kernels.gpu.device import INTERPRETED, device
    except ImportError as error:
        raise MissingDependencyError("Triton is not installed", fix="pip install isobatch[gpu]") from error
    device()
    if INTERPRETED:
        raise UnsupportedOpError("the interpreter's times say nothing", fix="unset TRITON_INTERPRET")
    if arguments.target == "serve":
        model, repeats = arguments.model or MODEL, arguments.repeats or bench_serve.REPEATS
        if arguments.only == ["steps"]:
            return bench_steps.run(model, progress)
        return bench_serve.run(model, repeats, stock=not arguments.only, progress=progress, keep=keep)
    parts = arguments.only or list(_PARTS["gpu"])
    verdicts = bench_gpu.gate(parts, progress)
    if failures := [str(verdict) for verdict in verdicts if not verdict.member]:
        return {"failures": failures}
    transcript = list(map(str, verdicts))
    return {"gate": "green", "certification": transcript, **bench_gpu.measure(parts, progress)}


def _print(console: Console, report: dict[str, Any]) -> None:
    if "figures" in report:
        _print_cpu(console, report)
    elif "profiles" in report:
        from isobatch.cli import bench_steps

        for table in bench_steps.tables(report):
            console.print(table)
    else:
        _print_gpu(console, report)


def _print_cpu(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="isobatch on the CPU; ratio above 1: isobatch is better")
    for heading in ("", "unit", "isobatch", "other side", "ratio", "goal"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for figure in report["figures"]:
        goal = figure["goal"]  # 0 for none
        color = "default" if not goal else "green" if figure["ratio"] >= goal else "red"
        table.add_row(
            f"{figure['what']} against {figure['against']}",
            figure["unit"],
            f"{figure['isobatch']:.1f}",
            f"{figure['other']:.1f}",
            f"[{color}]{figure['ratio']:.2f}[/]",
            f"{goal:.2f}" if goal else "none",
        )
    console.print(table)


def _print_gpu(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="isobatch on the GPU")
    for heading in ("", "value", "goal"):
        table.add_column(heading, justify="left" if not heading else "right")
    for goal in report["goals"]:
        color = "green" if goal["met"] else "red"
        table.add_row(goal["what"], f"[{color}]{goal['value']:.3f}[/]", f"{goal['goal']:.2f}")
    console.print(table)
    if "beside" in report:
        from isobatch.cli import beside

        console.print(beside.table(report))
