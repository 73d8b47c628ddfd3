"""How long GPU work takes, without the launches: graphs over fresh data, the candidates taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from isobatch.kernels.gpu.tokens import fill_in

_AWAKE = 50.0  # milliseconds

Work = Callable[[int], object]
"""One call of what is timed, on the given copy of its data."""


def capture(work: Work, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call per copy.

    Args:
        work: must not synchronise.
        copies: of the data. Together they should be several times the second-level cache, so that each call
            finds its own copy in device memory, as it would in a model.

    Returns:
        The graph, ready to replay.
    """
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            work(copy)
    return graph


def microseconds(sides: Sequence[Work], copies: int, rounds: int = 12) -> list[float]:
    """The median time of one call of each side.

    Args:
        sides: what is compared. They take turns, so that a slow spell of the machine hits all alike.
        copies: of the data, as for `capture`.
        rounds: replays of each side's graph.

    Returns:
        Microseconds per call, in the order of `sides`.
    """
    graphs = [capture(side, copies) for side in sides]
    spans = [[(_event(), _event()) for _ in range(rounds)] for _ in graphs]
    _awake(graphs)
    for turn in range(rounds):
        for graph, events in zip(graphs, spans, strict=True):
            events[turn][0].record()
            graph.replay()
            events[turn][1].record()
    torch.cuda.synchronize()
    return [
        statistics.median(start.elapsed_time(stop) for start, stop in events) * 1e3 / copies
        for events in spans
    ]


def _awake(graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
    """Replays until a GPU that had nothing to do runs at its clock again, launching kernels as in a server.

    Those that captures have launched, plainly or not, would decide how (`kernels/gpu/tokens.py`).
    """
    token = torch.zeros(1, dtype=torch.int64, device="cuda")
    fill_in(token, token.int(), token, token)
    start, now = _event(), _event()
    start.record()
    spent = 0.0
    while spent < _AWAKE:
        for graph in graphs:
            graph.replay()
        now.record()
        torch.cuda.synchronize()
        spent = start.elapsed_time(now)


def queued_microseconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of work that a host can queue faster than the device does it, such as a replay.

    All rounds are queued one behind the other, after two that are not counted: while the device does those,
    the host gets ahead. So a round ends when the next begins, and nothing in between waits for the host.

    Args:
        work: must not synchronise.
        rounds: how many are counted.

    Returns:
        Microseconds.
    """
    ends = [_event() for _ in range(1 + rounds)]
    for _ in range(2):
        work()
    ends[0].record()
    for end in ends[1:]:
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(ends)) * 1e3


def queued_in_turns(works: Sequence[Callable[[], object]], rounds: int, each: int = 5) -> list[float]:
    """The same of several, which take turns, so that a slow spell of the machine hits all alike.

    Args:
        works: must not synchronise.
        rounds: turns of each.
        each: how many are counted of a turn, behind one that is not.

    Returns:
        Microseconds, in the order of `works`.
    """
    turns: list[list[float]] = [[] for _ in works]
    marks = []
    for _ in range(rounds):
        for times, work in zip(turns, works, strict=True):
            work()
            ends = [_event() for _ in range(1 + each)]
            ends[0].record()
            for end in ends[1:]:
                work()
                end.record()
            marks.append((times, ends))
    torch.cuda.synchronize()
    for times, ends in marks:
        times += [a.elapsed_time(b) for a, b in pairwise(ends)]
    return [statistics.median(times) * 1e3 for times in turns]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
