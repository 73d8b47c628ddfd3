"""How the time of one decode step grows with the batch and with the context, beside the least it could be.

A step is what the engine queues for it: the gathering of its tokens, the recorded graph from embedding to
hidden states, the output projection, and greedy sampling. It is timed on the device, with the host ahead, so
that nothing of the host is in it; what the host adds is in the profile (`cli/step_profile.py`).

The floor is what the bytes take at the bandwidth of a copy, or the operations at the peak rate, whichever is
more. The bytes are the weights that a step reads and the keys and values of all contexts. Of an embedding
that is not the output projection too, a step reads a few rows, and of a mixture of experts at least those of
one token: nothing else of these is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

import torch

from isobatch.cli.floors import step_floor
from isobatch.cli.goals import Point
from isobatch.cli.workloads import BATCHES, CONTEXT, CONTEXTS, FEW
from isobatch.engine import sampler
from isobatch.engine.batch import meanings
from isobatch.engine.engine import Engine
from isobatch.engine.graphs import DecodeGraphs, Pending
from isobatch.engine.memory import block_bytes
from isobatch.engine.request import Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import Chunk, ScheduledStep
from isobatch.errors import UnsupportedOpError
from isobatch.kernels.attention.gpu_rows import GpuKVCache
from isobatch.kernels.gpu.timing import queued_microseconds
from isobatch.ops.queued import QueuedOps

_ROUNDS = 24


def growth(
    engine: Engine, native: int, limits: dict[str, float], progress: Callable[[str], None]
) -> tuple[list[Point], list[dict[str, Any]]]:
    """Times a step of every batch and context whose keys and values fit, no block shared by two sequences.

    Args:
        engine: without work; its caches are written over.
        native: the context that the model was configured for. Beyond it the cost is as real as within.
        limits: as `bench_gpu.ceilings` gives them.
        progress: told each point.

    Returns:
        The points; and what was left out, each with the reason.
    """
    decoder = engine.decoder
    config, page, blocks = decoder.config, decoder.ops.page, engine.pool.num_blocks
    graphs = DecodeGraphs(
        decoder, cast(QueuedOps, decoder.ops), engine.caches, max(BATCHES), engine.max_context
    )
    fill_caches(engine)
    points, left_out = [], []
    for batch, context in _spots():
        if batch * -(-context // page) > blocks:
            each = block_bytes(config, 2)
            need, have = (n * each / 1e9 for n in (batch * -(-context // page), blocks))
            why = f"keys and values take {need:.1f} GB, and the cache has {have:.1f}"
            left_out.append({"what": f"batch {batch}, context {context}", "why": why})
            continue
        progress(f"a step of {batch} x {context} tokens")
        time = queued_microseconds(step_work(decoder.ops, graphs, config.vocab_size, batch, context), _ROUNDS)
        moved, computed = step_floor(config, batch, batch * context, limits)
        floor = max(moved, computed) * 1e6
        points.append(
            {
                "batch": batch,
                "context": context,
                "us": time,
                "floor_us": floor,
                "floor_of": "bytes" if moved >= computed else "operations",
                "above_floor": time / floor,
                "beyond_the_models_context": context > native,
            }
        )
    return points, left_out


def _spots() -> list[tuple[int, int]]:
    return [(b, CONTEXT) for b in BATCHES] + [(b, context) for b in FEW for context in CONTEXTS]


def fill_caches(engine: Engine) -> None:
    """Numbers as keys and values have them: what memory held before may be NaN, or switch no transistor."""
    for cache in engine.caches:
        kept = cast(GpuKVCache, cache)
        for tensor in (kept.k, kept.v):
            tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


def step_work(
    ops: Any, graphs: DecodeGraphs, vocabulary: int, batch: int, context: int
) -> Callable[[], torch.Tensor]:
    """What queues a step and gives its tokens: every sequence computes the last of its `context` tokens.

    As in a server the token to begin with is one that a step has just sampled, on the device.
    """
    pages = -(-context // ops.page)
    draw = random.Random(f"{batch} x {context}")
    greedy = SamplingParams(temperature=0)
    chunks = [
        Chunk(
            Sequence(id=row, prompt_ids=(0,), params=greedy, seed=row, arrival=row),
            start=context - 1,
            token_ids=(draw.randrange(vocabulary),),
            block_table=tuple(range(row * pages, (row + 1) * pages)),
            samples=True,
        )
        for row in range(batch)
    ]
    step = ScheduledStep(tuple(chunks), ())
    rows = meanings(step)
    tokens = ops.tensor([chunk.token_ids[0] for chunk in chunks])
    pending = Pending(tokens, {row: row for row in range(batch)})
    queue, drawn = graphs.ready(step, rows, pending), sampler.sampling_rows(ops, rows)

    if queue is None:
        raise UnsupportedOpError("no memory to record a step", got=f"{batch} x {context} tokens")

    def run() -> torch.Tensor:
        computed = queue()
        if computed.logits is None:
            return cast(torch.Tensor, computed.tokens)
        return cast(torch.Tensor, ops.sample(computed.logits, drawn))

    return run
