"""The seven relations on the GPU: a busy stream for a busy thread, graph replay for thread counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from isobatch.audit.relations import (
    Relation,
    Violation,
    alone_equals_batched,
    layout_is_free,
    members_agree,
    neighbours_are_inert,
    position_is_free,
    violated,
)
from isobatch.kernels.registry import Member, OpRecord, Outputs

_ROWS = 41
_RERUNS = 20


@contextmanager
def _busy_stream() -> Iterator[None]:
    """Keeps another stream at work on the same multiprocessors inside the block."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    left = torch.ones(2048, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(stream):
        for _ in range(400):
            torch.mm(left, left)
    try:
        yield
    finally:
        stream.synchronize()


def rerun_repeats(record: OpRecord, member: Member) -> Violation | None:
    """Twenty runs give the same bits while another stream keeps the GPU busy."""
    for variant in record.variants:
        run = record.draw(f"{record.name}/{variant}/{_ROWS}", _ROWS, variant).prepare(member)
        expected = tuple(output.clone() for output in run())
        for _ in range(_RERUNS):
            with _busy_stream():
                got = run()
            violation = violated("rerun repeats", record, member, variant, expected, got)
            if violation is not None:
                return violation
    return None


def graph_equals_eager(record: OpRecord, member: Member) -> Violation | None:
    """A captured call, replayed twice into poisoned memory, gives the bits of an eager one."""
    for variant in record.variants:
        run = record.draw(f"{record.name}/{variant}/{_ROWS}", _ROWS, variant).prepare(member)
        first, second = run(), run()
        expected = tuple(output.clone() for output in first)
        # What is handed through is an input, and must stay what it is.
        made = [a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                captured: Outputs = run()
        for _ in range(2):
            for output, fresh in zip(captured, made, strict=True):
                if fresh:
                    output.fill_(float("nan") if output.is_floating_point() else -1)
            graph.replay()
            torch.cuda.synchronize()
            violation = violated("graph equals eager", record, member, variant, expected, captured)
            if violation is not None:
                return violation
    return None


GPU_RELATIONS: dict[str, Relation] = {
    relation.__name__: relation
    for relation in (
        alone_equals_batched,
        position_is_free,
        neighbours_are_inert,
        layout_is_free,
        rerun_repeats,
        graph_equals_eager,
        members_agree,
    )
}
