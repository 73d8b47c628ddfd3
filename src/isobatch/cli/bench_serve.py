"""The figures of `isobatch bench serve`: whole workloads through the engine on the GPU, weights random.

Each workload runs twice, and the second run counts: kernels are compiled and graphs recorded in the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from isobatch.cli.bench_gpu import ceilings
from isobatch.cli.goals import Goal, Point, at_least, at_most
from isobatch.cli.workloads import MODEL, WORKLOADS, Workload
from isobatch.config import EngineConfig
from isobatch.engine.backend import make_ops, open_model
from isobatch.engine.engine import Engine
from isobatch.engine.memory import block_bytes, weight_bytes
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IntegrityError
from isobatch.kernels.layout import PAGE
from isobatch.models.config import ModelConfig
from isobatch.models.loading import load_decoder

_KV_TOKENS = 300_000
_GATE_TOKENS = 48

GATE = Workload(41, (30, 900), (8, 60))
"""A prompt, and those among which its copies must not change."""


def make_engine(model: str = MODEL) -> Engine:
    """An engine on the GPU with random weights, and room for every workload."""
    base = EngineConfig(device="cuda", load="random")
    checkpoint = open_model(Path(model).name, base)
    config = EngineConfig(
        device="cuda",
        load="random",
        kv_cache_bytes=block_bytes(checkpoint.config, base.number_bytes) * (_KV_TOKENS // PAGE),
        max_batch_tokens=8192,
        max_batch_sequences=1024,
        max_context=8192,
        prefix_cache=False,
    )
    decoder = load_decoder(checkpoint, make_ops(config, checkpoint.config), lambda _done, _total: None)
    return Engine(decoder, None, config)


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


def measure(engine: Engine, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs every workload.

    Args:
        engine: as `make_engine` makes it, its bits checked.
        progress: told each workload.

    Returns:
        ceilings of the device, goals with what was reached, and a point for each workload.
    """
    limits = ceilings()
    points = list(_points(engine, limits, progress))
    return {"model": MODEL, "ceilings": limits, "goals": summary(points), "points": points}


def _points(engine: Engine, limits: dict[str, float], progress: Callable[[str], None]) -> Iterator[Point]:
    for workload in WORKLOADS:
        progress(workload.name)
        asks = workload.asks(engine.decoder.config.vocab_size)
        _, first = serve(engine, asks)
        seconds, replies = serve(engine, asks)
        pairs = zip(first, replies, strict=True)
        if any(a.completions[0].token_ids != b.completions[0].token_ids for a, b in pairs):
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


def floor_seconds(
    config: ModelConfig, asks: Sequence[tuple[list[int], SamplingParams]], limits: dict[str, float]
) -> float:
    """The least time: prompts at the peak rate, then steps that read weights and keys once, all together."""
    weights = weight_bytes(config, 2)
    key_bytes = block_bytes(config, 2) // PAGE
    operations = weights  # two for each number of two bytes
    prompts = sum(len(prompt) for prompt, _ in asks)
    attended = sum(len(prompt) ** 2 for prompt, _ in asks) * 2 * config.num_layers
    total = (prompts * operations + attended * config.num_heads * config.head_size) / limits["flop_per_s"]
    for step in range(1, max(params.max_tokens for _, params in asks)):
        running = [len(prompt) + step for prompt, params in asks if step < params.max_tokens]
        moved = weights + sum(running) * key_bytes
        total += max(moved / limits["bytes_per_s"], len(running) * operations / limits["flop_per_s"])
    return total


def summary(points: list[Point]) -> list[Goal]:
    """The goals, and whether they are met."""
    goals = []
    for workload, point in zip(WORKLOADS, points, strict=True):
        if workload.goal:
            goals.append(at_most(f"{workload.name}: seconds", point["seconds"], workload.goal))
        else:
            goals.append(at_least(f"{workload.name}: tokens/s", point["tokens_per_s"], workload.rate))
    return goals
