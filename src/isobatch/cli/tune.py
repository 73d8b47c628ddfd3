"""`isobatch tune`: find the fastest certified kernels for a model's shapes on this GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_DTYPES = ("bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "tune",
        help="find the fastest certified GPU kernels for a model's shapes",
        description="Autotuning under bitwise equality: tries every kernel for every shape and number of "
        "rows, keeps the fastest of those that give the class's bits. It changes speed, never a bit.",
    )
    parser.add_argument("models", nargs="+", help="well-known models, such as qwen3-8b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="tensor-parallel sizes (default 1)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of weights (default bfloat16)")
    parser.add_argument("--out", type=Path, help="plan file (default: the one this machine uses)")
    parser.add_argument("--transcript", type=Path, help="keep what was tried, admitted, refused and timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Tunes, and keeps the tables.

    Returns:
        0.

    Raises:
        ConfigError: a model that is not known, or cannot be cut into so many ranks.
        UnsupportedOpError: no GPU.
        MissingDependencyError: no Triton.
    """
    import torch

    from isobatch.cli import results
    from isobatch.errors import MissingDependencyError
    from isobatch.kernels import plan as plans
    from isobatch.models.presets import preset

    try:
        from isobatch.kernels.gpu.device import architecture, device
        from isobatch.kernels.linear.members import Shape
        from isobatch.kernels.linear.tune import tune
    except ImportError as error:
        raise MissingDependencyError("Triton is not installed", fix="pip install isobatch[gpu]") from error

    dtype = getattr(torch, arguments.dtype)
    shapes = {}
    for name in arguments.models:
        for ranks in arguments.ranks:
            for product, (outputs, inputs) in preset(name).products(ranks).items():
                # Logits are wanted in float32; the 16-bit form is what comparisons are made with.
                for out in (dtype, torch.float32) if product == "lm_head" else (dtype,):
                    shapes[Shape(outputs, inputs, dtype, out)] = f"{name} {product}"
    device()
    console = Console(stderr=True)
    tables: dict[str, tuple[plans.Entry, ...]] = {}
    transcript: dict[str, Any] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=len(shapes) * len(plans.BUCKETS))
        for shape, name in shapes.items():

            def tell(rows: int, name: str = name) -> None:
                bar.update(task, advance=1, description=f"{name}, {rows} rows")

            trials = tune(shape, progress=tell)
            entries = [trial.entry() for trial in trials]
            tables[shape.key] = (*entries[:-1], (None, entries[-1][1]))
            transcript[shape.key] = [
                {
                    "rows": trial.rows,
                    "torch_us": round(trial.torch_us, 2),
                    "admitted_us": {member: round(us, 2) for member, us in trial.times},
                    "refused": trial.refused,
                }
                for trial in trials
            ]
    found = plans.Plan(architecture(), {"linear": tables})
    path = arguments.out or plans.own_path(architecture())
    (plans.read(path, architecture()).merged(found) if path.exists() else found).write(path)
    console.print(f"{len(tables)} tables kept in {path}")
    if arguments.transcript:
        results.write(arguments.transcript, {"linear": transcript})
    if arguments.json:
        print(json.dumps({"plan": str(path), "tables": {key: list(t) for key, t in tables.items()}}))
    return 0
