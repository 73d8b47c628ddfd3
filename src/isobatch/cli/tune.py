"""`isobatch tune`: find the fastest certified kernels for a model's shapes on this GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from isobatch.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

    from isobatch.kernels.linear.members import Shape
    from isobatch.kernels.linear.tune import Trial

_DTYPES = ("bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "tune",
        help="find the fastest certified GPU kernels for a model's shapes",
        description="Autotuning under bitwise equality: tries kernels for every shape and number of rows, "
        "keeps the fastest of those that give the class's bits. It changes speed, never a bit. Each shape's "
        "table is kept as soon as it is made.",
    )
    parser.add_argument("models", nargs="+", help="well-known models, such as qwen3-8b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="tensor-parallel sizes (default 1)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of weights (default bfloat16)")
    parser.add_argument(
        "--rows",
        type=int,
        default=None,
        metavar="N",
        help="tune for up to so many rows, and leave what tables say beyond (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="seconds per shape: try only what the shipped tables chose at the nearest shapes, the default "
        "tile and the library's first suggestions",
    )
    parser.add_argument("--out", type=Path, help="plan file (default: the one this machine uses)")
    parser.add_argument("--transcript", type=Path, help="keep what was tried, admitted, refused and timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Tunes, and keeps each shape's table as soon as it is made.

    Returns:
        0.

    Raises:
        ConfigError: a model that is not known, or cannot be cut into so many ranks; no rows.
        UnsupportedOpError: no GPU.
        MissingDependencyError: no Triton.
    """
    import torch

    from isobatch.cli import results
    from isobatch.kernels import plan as plans

    try:
        from isobatch.kernels.gpu.device import architecture, device
        from isobatch.kernels.linear import tune as tuning
    except ImportError as error:
        raise MissingDependencyError("Triton is not installed", fix="pip install isobatch[gpu]") from error

    shapes = _shapes(arguments.models, arguments.ranks, getattr(torch, arguments.dtype))
    buckets = plans.buckets(arguments.rows)
    device()
    search = tuning.quick(plans.shipped(architecture())) if arguments.quick else tuning.THOROUGH
    path = arguments.out or plans.own_path(architecture())
    plan = plans.read(path, architecture()) if path.exists() else plans.Plan(architecture())
    standing = plans.current(architecture()).merged(plan)
    console = Console(stderr=True)
    tables: dict[str, tuple[plans.Entry, ...]] = {}
    transcript: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(shapes) * len(buckets))
        for number, (shape, name) in enumerate(shapes.items(), 1):

            def tell(rows: int, name: str = name) -> None:
                bar.update(task, advance=1, description=f"{name}, {rows} rows")

            trials = tuning.tune(shape, buckets, progress=tell, search=search)
            entries = [trial.entry() for trial in trials]
            tables[shape.key] = plans.table(entries, standing.ops.get("linear", {}).get(shape.key, ()))
            transcript[shape.key] = _told(trials)
            plan = plan.merged(plans.Plan(architecture(), {"linear": {shape.key: tables[shape.key]}}))
            plan.write(path)
            if arguments.transcript:
                results.write(arguments.transcript, {"linear": transcript})
            if not console.is_terminal:
                line = f"{number} of {len(shapes)}: {name}, {shape.key}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(tables)} tables kept in {path}", soft_wrap=True)
    if arguments.json:
        print(json.dumps({"plan": str(path), "tables": {key: list(t) for key, t in tables.items()}}))
    return 0


def _shapes(models: Sequence[str], ranks: Sequence[int], dtype: torch.dtype) -> Mapping[Shape, str]:
    """The shapes of all the models' products, each once, and whose they are."""
    import torch

    from isobatch.kernels.linear.members import Shape
    from isobatch.models.presets import preset

    shapes = {}
    for name in models:
        for size in ranks:
            for product, (outputs, inputs) in preset(name).products(size).items():
                # Logits are wanted in float32; the 16-bit form is what comparisons are made with.
                for out in (dtype, torch.float32) if product == "lm_head" else (dtype,):
                    shapes[Shape(outputs, inputs, dtype, out)] = f"{name} {product}"
    return shapes


def _told(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [
        {
            "rows": trial.rows,
            "torch_us": round(trial.torch_us, 2),
            "admitted_us": {member: round(us, 2) for member, us in trial.times},
            "refused": trial.refused,
        }
        for trial in trials
    ]
