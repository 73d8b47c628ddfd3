"""Which lines of a kernel's PTX a thread may reach that has not yet met a certain instruction.

A kernel may wait on one path of two, and its groups of warps each for itself. So the text's order says
little; what counts is every path from the entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*([$\w]+):")
_BRANCH = re.compile(r"^\s*(@!?%?\w+\s+)?bra(?:\.uni)?\s+([$\w]+)\s*;")
_TABLE = re.compile(r"\bbrx\.idx(?:\.uni)?\s+%?\w+,\s*([$\w]+)\s*;")
_TARGETS = re.compile(r"\s*\.branchtargets([^;]*);")
_END = re.compile(r"^\s*(@!?%?\w+\s+)?(?:ret|exit)\s*;")
_MEETING = re.compile(r"^\s*barrier\.sync\b")


@dataclass(frozen=True, slots=True)
class _Flow:
    """Lines and what may come after each; a table's targets apart, to which groups of warps are sent."""

    lines: list[str]
    after: list[list[int]]
    sent: dict[int, list[int]]


def reached_without(ptx: str, instruction: str) -> list[str]:
    """The lines that some path from the entry reaches without the instruction, in the text's order.

    Groups of warps stand at a barrier until the first group sends them to their work. If that one has met the
    instruction by then, they need not.

    Args:
        ptx: of one kernel.
        instruction: without operands. One that is executed on a condition counts as none.

    Raises:
        ValueError: a jump leads to a label that is not there.
    """
    flow = _flow(ptx[ptx.index(".entry") :])
    met = re.compile(rf"^\s*{re.escape(instruction)}\s*;")

    def unmet(at: int) -> list[int]:
        return [] if met.match(flow.lines[at]) else flow.after[at]

    found = _closure([0], unmet)
    groups = _leading_to(flow, flow.sent)
    sends = any(_MEETING.match(flow.lines[at]) and at not in groups for at in found)
    if flow.sent and sends:
        found = _closure(found, lambda at: [*unmet(at), *flow.sent.get(at, ())])
    return [flow.lines[at] for at in sorted(found)]


def _flow(text: str) -> _Flow:
    lines = [line.split("//")[0] for line in text.splitlines()]
    labels: dict[str, list[int]] = {}
    for at, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels.setdefault(label[1], []).append(at)

    def nearest(name: str, at: int) -> int:
        """Labels in assembly that is written by hand repeat; the one close by is meant."""
        if name not in labels:
            raise ValueError(f"no label {name}")
        return min(labels[name], key=lambda line: abs(line - at))

    after: list[list[int]] = []
    sent = {}
    for at, line in enumerate(lines):
        following = [at + 1] if at + 1 < len(lines) else []
        if branch := _BRANCH.match(line):
            after.append([nearest(branch[2], at), *(following if branch[1] else [])])
        elif table := _TABLE.search(line):
            targets = _TARGETS.match("\n".join(lines[nearest(table[1], at) + 1 :]))
            if targets is None:
                raise ValueError(f"no targets behind {table[1]}")
            sent[at] = [nearest(name.strip(), at) for name in targets[1].split(",")]
            after.append([])
        else:
            end = _END.match(line)
            after.append([] if end and not end[1] else following)
    return _Flow(lines, after, sent)


def _closure(start: Collection[int], after: Callable[[int], list[int]]) -> set[int]:
    found, todo = set(start), list(start)
    while todo:
        new = [line for line in after(todo.pop()) if line not in found]
        found.update(new)
        todo += new
    return found


def _leading_to(flow: _Flow, ends: Collection[int]) -> set[int]:
    """The lines from which one of these can be reached."""
    before: dict[int, list[int]] = {}
    for at, following in enumerate(flow.after):
        for line in (*following, *flow.sent.get(at, ())):
            before.setdefault(line, []).append(at)
    return _closure(ends, lambda at: before.get(at, []))
