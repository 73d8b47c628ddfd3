"""The figures of `isobatch bench serve`: whole workloads through the engine on the GPU, weights random.

Each workload first runs uncounted: kernels are compiled then, and graphs recorded. The ratio to stock is
our time over that of torch's own kernels (docs/adr/0021-stock-on-the-gpu.md) in the same engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from isobatch.cli.bench_gpu import ceilings
from isobatch.cli.floors import prompts_floor, step_floor
from isobatch.cli.goals import Goal, Point, at_least, at_most
from isobatch.cli.model import release, settle
from isobatch.cli.workloads import WORKLOADS, Workload
from isobatch.config import EngineConfig, Kernels
from isobatch.engine.backend import make_ops, open_model, require_memory
from isobatch.engine.engine import Engine, check_settings
from isobatch.engine.memory import block_bytes
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IntegrityError
from isobatch.kernels.layout import PAGE
from isobatch.models.checkpoint import Checkpoint
from isobatch.models.config import ModelConfig
from isobatch.models.loading import load_decoder

REPEATS = 1
_KV_TOKENS = 300_000
_WARM = 2  # uncounted runs: the first compiles kernels, the second records prompts of sizes that come again
_GATE_TOKENS = 48

GATE = Workload(41, (30, 900), (8, 60))
"""A prompt, and those among which its copies must not change."""


def make_engine(model: str, kernels: Kernels = "isobatch") -> Engine:
    """An engine on the GPU with random weights, and room for every workload.

    Raises:
        ConfigError: nobody knows the model, or its context is too short for the workloads.
        OutOfMemoryError: it does not fit.
    """
    config = EngineConfig(
        kernels=kernels,
        device="cuda",
        load="random",
        max_batch_tokens=8192,
        max_batch_sequences=1024,
        max_context=8192,
        prefix_cache=False,
    )
    checkpoint = open_model(model, config)
    room = block_bytes(checkpoint.config, config.number_bytes) * (_KV_TOKENS // PAGE)
    return loaded(checkpoint, replace(config, kv_cache_bytes=room))


def loaded(checkpoint: Checkpoint, config: EngineConfig) -> Engine:
    """An engine without a tokenizer, in a process that does nothing else.

    Raises:
        ConfigError: settings that this model cannot be run with.
        OutOfMemoryError: it does not fit.
    """
    check_settings(checkpoint.config, config)
    require_memory(config, checkpoint)
    decoder = load_decoder(checkpoint, make_ops(config, checkpoint.config))
    engine = Engine(decoder, None, config)
    settle()
    return engine


def serve(engine: Engine, asks: Sequence[tuple[list[int], SamplingParams]]) -> tuple[float, list[Any]]:
    """Seconds from the first request to the last reply, and the replies in order."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    numbers = [engine.add(prompt, params) for prompt, params in asks]
    replies = {}
    while engine.has_work:
        for reply in engine.step():
            replies[reply.request_id] = reply
    return time.perf_counter() - started, [replies[number] for number in numbers]


def gate(engine: Engine) -> list[str]:
    """One prompt alone, then its copies among others of all lengths: what differs, nothing if all is well."""
    (prompt, _), *others = GATE.asks(engine.decoder.config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=_GATE_TOKENS, ignore_eos=True, logprobs=1)
    _, (alone,) = serve(engine, [(prompt, params)])
    mixed = [ask for other in others for ask in ((prompt, params), other)]
    _, replies = serve(engine, mixed)
    want = alone.completions[0]
    copies = [reply.completions[0] for reply in replies[::2]]
    wrong = sum(c.token_ids != want.token_ids or c.log_probs != want.log_probs for c in copies)
    return [f"{wrong} of {len(copies)} copies differ from the reply alone"] if wrong else []


def run(
    model: str,
    repeats: int,
    stock: bool,
    progress: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda _report: None,
) -> dict[str, Any]:
    """Checks the bits and runs every workload: by our kernels, then by torch's own in the same engine.

    Args:
        model: a configuration, whose weights are random.
        repeats: counted runs of each workload and side.
        stock: whether torch's side runs at all.
        progress: told each workload.
        keep: given what there is before torch's side begins, which takes minutes and may be interrupted.

    Returns:
        failures if the bits were wrong. Else ceilings of the device, goals with what was reached, and a point
        for each workload.

    Raises:
        ConfigError, OutOfMemoryError: as `make_engine`.
        IntegrityError: two runs of ours differ.
    """
    report = _ours(model, repeats, progress)
    if stock and "failures" not in report:
        keep(report)
        release()  # the two are not held in memory at the same time
        compare(report["points"], make_engine(model, "stock"), repeats, progress)
        report["goals"] = summary(report["points"])
    return report


def _ours(model: str, repeats: int, progress: Callable[[str], None]) -> dict[str, Any]:
    engine = make_engine(model)
    if failures := gate(engine):
        return {"failures": failures}
    return {"gate": "green", "model": model, **measure(engine, repeats, progress)}


def measure(engine: Engine, repeats: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs every workload by our kernels.

    Args:
        engine: as `make_engine` makes it, its bits checked.
        repeats: counted runs.
        progress: told each workload.

    Returns:
        ceilings of the device, goals with what was reached, and a point for each workload.

    Raises:
        IntegrityError: two runs differ.
    """
    limits = ceilings()
    points = list(_points(engine, repeats, limits, progress))
    return {"ceilings": limits, "repeats": repeats, "goals": summary(points), "points": points}


def _points(
    engine: Engine, repeats: int, limits: dict[str, float], progress: Callable[[str], None]
) -> Iterator[Point]:
    for workload in WORKLOADS:
        asks = workload.asks(engine.decoder.config.vocab_size)
        seconds, runs = _timed(engine, workload, repeats, progress)
        if any(other != runs[0] for other in runs):
            raise IntegrityError(f"{workload.name}: two runs differ")
        new = sum(params.max_tokens for _, params in asks)
        floor = floor_seconds(engine.decoder.config, asks, limits)
        yield {
            "op": "serve",
            "workload": workload.name,
            "seconds": seconds,
            "tokens_per_s": new / seconds,
            "floor_s": floor,
            "above_floor": seconds / floor,
            "goal_s": workload.goal or new / workload.rate,
        }
        progress(f"{workload.name}: {seconds:.2f} s, {new / seconds:.0f} tokens/s, floor {floor:.2f} s")


def compare(points: list[Point], engine: Engine, repeats: int, progress: Callable[[str], None]) -> None:
    """Runs every workload by torch's own kernels, and adds to each point how ours compare.

    Args:
        points: as `measure` gives them.
        engine: the same model with stock kernels.
        repeats: counted runs.
        progress: told each workload.
    """
    for workload, point in zip(WORKLOADS, points, strict=True):
        seconds, _ = _timed(engine, workload, repeats, progress)
        point |= {"stock_s": seconds, "ratio_to_stock": point["seconds"] / seconds}
        progress(f"{workload.name}: stock {seconds:.2f} s, ratio {point['ratio_to_stock']:.2f}")


def _timed(
    engine: Engine, workload: Workload, repeats: int, progress: Callable[[str], None]
) -> tuple[float, list[list[tuple[int, ...]]]]:
    """The median of the counted runs' seconds, and the replies' tokens of every run."""
    progress(f"{engine.decoder.ops.name}: {workload.name}")
    asks = workload.asks(engine.decoder.config.vocab_size)
    times, runs = [], []
    for _ in range(_WARM + repeats):
        seconds, replies = serve(engine, asks)
        times.append(seconds)
        runs.append([reply.completions[0].token_ids for reply in replies])
    return statistics.median(times[_WARM:]), runs


def floor_seconds(
    config: ModelConfig, asks: Sequence[tuple[list[int], SamplingParams]], limits: dict[str, float]
) -> float:
    """The least time: all prompts together, then steps that read weights and keys once."""
    total = prompts_floor(config, [len(prompt) for prompt, _ in asks], limits)
    for step in range(1, max(params.max_tokens for _, params in asks)):
        running = [len(prompt) + step for prompt, params in asks if step < params.max_tokens]
        total += max(step_floor(config, len(running), sum(running), limits))
    return total


def summary(points: list[Point]) -> list[Goal]:
    """The goals, and whether they are met."""
    goals = []
    for workload, point in zip(WORKLOADS, points, strict=True):
        if workload.goal:
            goals.append(at_most(f"{workload.name}: seconds", point["seconds"], workload.goal))
        else:
            goals.append(at_least(f"{workload.name}: tokens/s", point["tokens_per_s"], workload.rate))
        if "ratio_to_stock" in point:
            goals.append(at_most(f"{workload.name}: ratio to stock", point["ratio_to_stock"], 1.0))
    return goals
