"""`isobatch tune`: find the fastest certified kernels for a model's shapes on this GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from isobatch.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import torch

    from isobatch.config import EngineConfig
    from isobatch.kernels.linear.members import Shape
    from isobatch.models.checkpoint import Checkpoint

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
    parser.add_argument(
        "--steps",
        action="store_true",
        help="then let each model's own decode steps, with random weights, choose among the fastest, for up "
        "to 512 rows, the output projection for up to 128; of models that share a shape the last one's",
    )
    parser.add_argument("--layers", type=int, help="of the models, where not all of them fit (with --steps)")
    parser.add_argument("--out", type=Path, help="plan file (default: the one this machine uses)")
    parser.add_argument("--transcript", type=Path, help="keep what was tried, admitted, refused and timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Tunes, and keeps each shape's table as soon as it is made.

    Returns:
        0.

    Raises:
        ConfigError: a model that is not known, or cannot be cut into so many ranks; no rows; options that do
            not go together.
        OutOfMemoryError: a model whose steps are wanted does not fit.
        UnsupportedOpError: no GPU, or no memory to record a step; all tables found so far are kept.
        MissingDependencyError: no Triton.
    """
    _check(arguments)
    import torch

    from isobatch.cli.model import release
    from isobatch.kernels import plan as plans

    try:
        from isobatch.cli import tune_steps
        from isobatch.cli.bench_serve import loaded
        from isobatch.cli.tables import Tables
        from isobatch.kernels.gpu.device import architecture, device
        from isobatch.kernels.linear import tune as tuning
    except ImportError as error:
        raise MissingDependencyError("Triton is not installed", fix="pip install isobatch[gpu]") from error

    dtype = getattr(torch, arguments.dtype)
    shapes, buckets = _shapes(arguments.models, arguments.ranks, dtype), plans.buckets(arguments.rows)
    device()
    search = tuning.quick(plans.shipped(architecture())) if arguments.quick else tuning.THOROUGH
    console = Console(stderr=True)
    engines = _engines(arguments, buckets[-1])
    kept = Tables(arguments.out or plans.own_path(architecture()), arguments.transcript, architecture())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        stepped = sum(rows <= tune_steps.MOST for rows in buckets)
        task = bar.add_task("", total=len(shapes) * len(buckets) + len(engines) * stepped)

        def told(what: str) -> Callable[[int], None]:
            return lambda rows: bar.update(task, advance=1, description=f"{what}, {rows} rows")

        def say(number: int, of: int, what: str) -> None:
            if not console.is_terminal:
                console.print(f"{number} of {of}: {what}", markup=False, highlight=False, soft_wrap=True)

        for number, (shape, name) in enumerate(shapes.items(), 1):
            kept.keep(shape, tuning.tune(shape, buckets, progress=told(name), search=search))
            say(number, len(shapes), f"{name}, {shape.key}")
        for number, (model, made_of) in enumerate(engines.items(), 1):
            release()  # what the last ones took
            products = tune_steps.shapes_of_steps(model, dtype)
            tune_steps.by_steps(loaded(*made_of), products, kept.trials, kept.keep, told(model))
            say(number, len(engines), f"steps of {model}")
    console.print(f"{len(kept.trials)} tables kept in {kept.path}", soft_wrap=True)
    if arguments.json:
        print(json.dumps({"plan": str(kept.path), "tables": kept.by_key()}))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what needs no GPU to be found wrong."""
    from isobatch.kernels import plan as plans
    from isobatch.models.presets import preset

    for name in arguments.models:
        for size in arguments.ranks:
            preset(name).products(size)
    plans.buckets(arguments.rows)
    if arguments.steps and arguments.ranks != [1]:
        raise ConfigError("steps are a whole model's", expected="--ranks 1", got=arguments.ranks)
    if arguments.layers is not None and not arguments.steps:
        raise ConfigError("--layers is for steps", expected="--steps beside it", got="none")


def _engines(arguments: argparse.Namespace, rows: int) -> dict[str, tuple[Checkpoint, EngineConfig]]:
    """For each model whose steps are wanted what its engine is made of: what is wrong is said at once."""
    from isobatch.cli.tune_steps import settings

    models = arguments.models if arguments.steps else ()
    return {model: settings(model, arguments.dtype, arguments.layers, rows) for model in models}


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
