"""Planted faults: a member whose last bit depends on what it must not. Each relation has to catch its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import torch

from isobatch.bits import digest
from isobatch.kernels.layout import PagedRows
from isobatch.kernels.registry import Member, Outputs, as_outputs

Fault = Callable[[dict[str, Any], Outputs, int], None]


def nudge(output: torch.Tensor, row: int, pattern: int = 1) -> None:
    """Flips low bits of a row's first element."""
    flat = output[row].reshape(-1) if output.dim() > 1 else output[row : row + 1]
    if output.is_floating_point():
        flat = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    flat[0] ^= pattern


def _by_row_count(_arguments: dict[str, Any], outputs: Outputs, _calls: int) -> None:
    if len(outputs[0]) > 1:
        for row in range(len(outputs[0])):
            nudge(outputs[0], row)


def _by_position(_arguments: dict[str, Any], outputs: Outputs, _calls: int) -> None:
    for row in range(1, len(outputs[0]), 2):
        nudge(outputs[0], row)


def _by_neighbours(_arguments: dict[str, Any], outputs: Outputs, _calls: int) -> None:
    pattern = int(digest(outputs[0])[:2], 16)
    for row in range(len(outputs[0])):
        nudge(outputs[0], row, pattern)


def _by_layout(arguments: dict[str, Any], outputs: Outputs, _calls: int) -> None:
    rows = arguments.get("rows")
    if isinstance(rows, PagedRows):
        first = int(rows.block_tables.flatten()[0])
        moved = int(rows.block_tables.sum()) % 2 == 1 or first % 3 == 0
        pattern = 1 + first % 7
    else:
        tensors = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        moved, pattern = any(t.data_ptr() % 16 or not t.is_contiguous() for t in tensors), 1
    if moved:
        nudge(outputs[0], 0, pattern)


def _by_time(_arguments: dict[str, Any], outputs: Outputs, calls: int) -> None:
    if calls % 5 == 4:
        nudge(outputs[0], 0)


def _by_threads(_arguments: dict[str, Any], outputs: Outputs, _calls: int) -> None:
    if numba.get_num_threads() == 3:
        nudge(outputs[0], 0)


def _always(_arguments: dict[str, Any], outputs: Outputs, _calls: int) -> None:
    nudge(outputs[0], 0)


FAULTS: dict[str, Fault] = {
    "alone_equals_batched": _by_row_count,
    "position_is_free": _by_position,
    "neighbours_are_inert": _by_neighbours,
    "layout_is_free": _by_layout,
    "rerun_repeats": _by_time,
    "threads_are_free": _by_threads,
    "members_agree": _always,
}


def planted(member: Member, fault: Fault) -> Member:
    """The member with the fault in it."""
    calls = 0

    def function(**arguments: Any) -> Any:
        nonlocal calls
        result = member.function(**arguments)
        fault(arguments, as_outputs(result), calls)
        calls += 1
        return result

    return replace(member, name=f"{member.name}+fault", function=function)
