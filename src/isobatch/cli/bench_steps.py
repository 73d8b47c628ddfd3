"""The figures of `isobatch bench serve --only steps`: what a decode step costs, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

from rich.table import Table

from isobatch.cli import bench_serve
from isobatch.cli.bench_gpu import ceilings
from isobatch.cli.model import release
from isobatch.cli.step_cost import growth
from isobatch.cli.step_profile import KERNELS, profile
from isobatch.cli.workloads import BATCHES, CONTEXTS
from isobatch.config import EngineConfig
from isobatch.engine.backend import open_model, sized
from isobatch.engine.engine import Engine
from isobatch.errors import UnsupportedOpError
from isobatch.models.random_weights import RandomCheckpoint

PROFILED = (1, 1000)
"""The batches whose steps are profiled."""
_KV_BYTES = 60 * 10**9
_BATCH_TOKENS = 8192


def make_engine(model: str) -> tuple[Engine, int]:
    """An engine on the GPU with random weights, and a KV cache of what is left, up to 60 GB.

    Its model takes the longest context that is measured: a table of angles that is longer costs a step
    nothing, and the weights are the same.

    Args:
        model: a configuration.

    Returns:
        The engine, and the context that the model was configured for.

    Raises:
        ConfigError: nobody knows the model.
        OutOfMemoryError: it does not fit.
    """
    config = EngineConfig(
        device="cuda",
        load="random",
        max_batch_tokens=_BATCH_TOKENS,
        max_batch_sequences=max(BATCHES),
        prefix_cache=False,
    )
    checkpoint = cast(RandomCheckpoint, open_model(model, config))
    native = checkpoint.config.context_length
    longer = checkpoint.with_context(max(native, *CONTEXTS))
    config = sized(replace(config, max_context=max(CONTEXTS)), longer.config)
    config = replace(config, kv_cache_bytes=min(_KV_BYTES, config.cache_bytes))
    return bench_serve.loaded(longer, config), native


def run(model: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Checks the bits, profiles steps of the engine, and times steps of every size.

    Args:
        model: a configuration, whose weights are random.
        progress: told each measurement.

    Returns:
        failures if the bits were wrong. Else ceilings of the device, profiles, a point for each batch and
        context, and what was left out.

    Raises:
        ConfigError, OutOfMemoryError: as `make_engine`.
    """
    progress("what the device can do")
    limits = ceilings()
    release()  # their gigabytes, before a KV cache of all that is left
    engine, native = make_engine(model)
    progress("checking the bits")
    if failures := bench_serve.gate(engine):
        return {"failures": failures}
    profiles, left_out = [], []
    for batch in PROFILED:
        progress(f"a profile of batch {batch}")
        try:
            profiles.append(profile(engine, batch))
        except UnsupportedOpError as error:  # no reason to go without the rest
            left_out.append({"what": f"the profile of batch {batch}", "why": str(error)})
    points, beyond = growth(engine, native, limits, progress)
    return {
        "gate": "green",
        "model": model,
        "ceilings": limits,
        "kv_cache_bytes": engine.config.cache_bytes,
        "profiles": profiles,
        "points": points,
        "left_out": [*left_out, *beyond],
    }


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """What a terminal shows of a report of `run`."""
    costs = Table(title="one decode step", caption=_caption(report))
    for heading in ("batch", "context", "ms", "floor, ms", "times the floor"):
        costs.add_column(heading, justify="right")
    for point in report["points"]:
        beyond = " *" if point["beyond_the_models_context"] else ""
        costs.add_row(
            str(point["batch"]),
            f"{point['context']}{beyond}",
            f"{point['us'] / 1e3:.3f}",
            f"{point['floor_us'] / 1e3:.3f}",
            f"{point['above_floor']:.2f}",
        )
    yield costs
    shares = Table(title="where its time goes: us, share, launches")
    shares.add_column("")
    for one in report["profiles"]:
        low, high = one["contexts"]
        shares.add_column(f"batch {one['batch']}, contexts {low}..{high}", justify="right")
    for kind in KERNELS:
        found = [next((k for k in one["kinds"] if k["kind"] == kind), None) for one in report["profiles"]]
        if any(found):
            cells = (f"{k['us']:.0f}  {k['share']:4.0%}  {k['launches']:4.0f}" if k else "" for k in found)
            shares.add_row(kind, *cells)
    for name, key in (("all", "us"), ("without the tracer", "untraced_us")):
        shares.add_row(name, *(f"{one[key]:.0f}" for one in report["profiles"]))
    if report["profiles"]:
        yield shares


def _caption(report: dict[str, Any]) -> str:
    notes = [f"left out: {one['what']}: {one['why']}" for one in report["left_out"]]
    if any(point["beyond_the_models_context"] for point in report["points"]):
        notes.insert(0, "* beyond the context that the model was configured for")
    return "\n".join(notes)
