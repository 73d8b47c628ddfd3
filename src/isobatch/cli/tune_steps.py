"""What `isobatch tune --steps` does: a model's own decode steps choose among the fastest members of linear.

Behind a small kernel a member does not meet the neighbours that it has in a model: how long the small kernel
takes, what it leaves in the caches, and how fast the clock is after a whole step. So the few that are fastest
there are put into recorded steps, one product of a layer after the other, and the step's time decides.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from isobatch.cli.step_cost import fill_caches, step_work
from isobatch.cli.workloads import CONTEXT
from isobatch.config import Dtype, EngineConfig
from isobatch.engine.backend import open_model, require_memory
from isobatch.engine.engine import Engine
from isobatch.engine.graphs import DRAWN, DecodeGraphs, ladder
from isobatch.engine.memory import block_bytes
from isobatch.errors import ConfigError, OutOfMemoryError
from isobatch.kernels import plan as plans
from isobatch.kernels.gpu.timing import queued_in_turns
from isobatch.kernels.layout import PAGE
from isobatch.kernels.linear.gpu import Linear
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.linear.tune import Trial
from isobatch.models.checkpoint import Checkpoint
from isobatch.models.presets import preset
from isobatch.ops.gpu import GpuOps

MOST = 512
"""Beyond so many rows a product hides what is around it."""
_TRIED = 4
_NOISE = 1.002  # what two measurements of the same steps differ by
_ROUNDS = 6


def settings(model: str, dtype: Dtype, layers: int | None, rows: int) -> tuple[Checkpoint, EngineConfig]:
    """What an engine on the GPU is made of for steps of up to so many rows, or of MOST, with random weights.

    Raises:
        ConfigError: nobody knows the model, or it has fewer layers.
        OutOfMemoryError: it does not fit.
    """
    batch = ladder(min(rows, MOST))[-1]
    config = EngineConfig(
        device="cuda",
        dtype=dtype,
        load="random",
        layers=layers,
        max_batch_tokens=batch,
        max_batch_sequences=batch,
        max_context=CONTEXT,
        prefix_cache=False,
    )
    checkpoint = open_model(model, config)
    blocks = batch * -(-CONTEXT // PAGE)
    room = block_bytes(checkpoint.config, config.number_bytes) * blocks
    config = replace(config, kv_cache_bytes=room)
    try:
        require_memory(config, checkpoint)
    except OutOfMemoryError as error:
        fix = "time steps of fewer layers (--layers) or rows (--rows)"
        raise OutOfMemoryError(error.what, expected=error.expected, got=error.got, fix=fix) from error
    return checkpoint, config


def shapes_of_steps(model: str, dtype: torch.dtype) -> list[Shape]:
    """A model's products, those first that take most of a step."""
    config, shapes = preset(model), {}
    for name, sides in config.products().items():
        head = name == "lm_head"
        shape = Shape(*sides, dtype, torch.float32 if head else dtype)
        shapes[shape] = shape.outputs * shape.inputs * (1 if head else config.layers)
    return sorted(shapes, key=lambda shape: -shapes[shape])


def by_steps(
    engine: Engine,
    shapes: Sequence[Shape],
    trials: Mapping[Shape, Sequence[Trial]],
    keep: Callable[[Shape, Sequence[Trial]], None],
    progress: Callable[[int], None] = lambda _rows: None,
) -> None:
    """Times steps with each of the fastest members, and has the best one serve in those that follow.

    Args:
        engine: of `settings`; its caches are written over.
        shapes: of its products, in the order in which they are decided.
        trials: what is known about each, for the same row counts.
        keep: given a shape's trials, with times of steps as far as there are, whenever one is decided.
        progress: told each row count before its steps.

    Raises:
        ConfigError: no trials of a shape.
        UnsupportedOpError: no memory to record a step.
    """
    if missing := [shape.key for shape in shapes if shape not in trials]:
        raise ConfigError("steps choose among what was tried", expected="trials", got=f"none of {missing}")
    fill_caches(engine)
    products = cast(GpuOps, engine.decoder.ops).products
    chosen = {shape: list(trials[shape]) for shape in shapes}
    counts = [trial.rows for trial in chosen[shapes[0]] if trial.rows <= MOST]
    for at, rows in enumerate(counts):
        progress(rows)
        for shape in shapes:
            products.choose(shape, rows, chosen[shape][at].entry()[1][0])
        for shape in shapes:
            trial = chosen[shape][at]
            names = _fastest(trial)
            if len(names) < 2 or (rows > DRAWN and shape.out_dtype != shape.dtype):
                continue  # of many rows the output projection is not in the recording
            timed = _times(engine, products, shape, rows, names)
            chosen[shape][at] = replace(trial, steps=tuple((name, timed[name]) for name in _order(timed)))
            products.choose(shape, rows, chosen[shape][at].steps[0][0])
            keep(shape, chosen[shape])
        gc.collect()  # recordings hold on to themselves


def _order(timed: Mapping[str, float]) -> list[str]:
    """The fastest first; those that steps do not tell from the fastest, as they were."""
    near = _NOISE * min(timed.values())
    return sorted(timed, key=lambda name: timed[name] if timed[name] > near else 0)


def _fastest(trial: Trial) -> list[str]:
    """A few, the library's fastest and ours among them: kernels that are alike are also wrong alike."""
    names = [name for name, _ in trial.times]
    library = [name for name in names if name.startswith("lt")]
    own = [name for name in names if not name.startswith("lt")]
    return list(dict.fromkeys([*names[:_TRIED], *library[:1], *own[:1]]))


def _times(
    engine: Engine, products: Linear, shape: Shape, rows: int, names: Sequence[str]
) -> dict[str, float]:
    """For each member what the smallest and the largest step of the bucket take together, microseconds."""
    served = [rung for rung in ladder(rows) if plans.bucket(rung) == rows]
    times = dict.fromkeys(names, 0.0)
    for batch in sorted({served[0], served[-1]}):
        steps = []
        for name in names:
            products.choose(shape, rows, name)
            steps.append(_step(engine, batch))
        for name, time in zip(names, queued_in_turns(steps, _ROUNDS), strict=True):
            times[name] += time
    return times


def _step(engine: Engine, batch: int) -> Callable[[], torch.Tensor]:
    decoder, ops = engine.decoder, cast(GpuOps, engine.decoder.ops)
    graphs = DecodeGraphs(decoder, ops, engine.caches, batch, engine.max_context)
    return step_work(ops, graphs, decoder.config.vocab_size, batch, CONTEXT)
