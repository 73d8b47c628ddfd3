"""Plans: which certified member serves an op's fixed axes at how many rows.

A plan may read the row count, since all it can choose among is members of one bit class: a plan that is
wrong, old, or missing costs time and never a bit. So a table is data, and needs no more trust than a hint.

The file: {"architecture": "sm90", "ops": {"linear": {"6144x4096.bfloat16": [[16, ["lt16.0",
"16x64x256.4.4wt"]], [null, ["lt8192.3"]]]}}}. Each entry: the most rows it is for (null for any), and names
of members, best first.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from isobatch import env
from isobatch.errors import ConfigError

Entry = tuple[int | None, tuple[str, ...]]
"""The most rows it is for, None for any number, and the names of members, best first."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 100, 128, 200, 256, 512, 1000, 2048, 4096, 8192)
"""The row counts that tables are tuned at; each serves the counts from the one before it up to its own, the
last one all beyond. Tiles are powers of two; 100, 200 and 1000 are there because cost is a staircase."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The tables of one architecture.

    Args:
        architecture: such as "sm90".
        ops: by op, then by key (the fixed axes and dtypes, as the op writes them), entries by ascending rows.
    """

    architecture: str
    ops: Mapping[str, Mapping[str, tuple[Entry, ...]]] = field(default_factory=dict)

    def names(self, op: str, key: str, rows: int) -> tuple[str, ...]:
        """Members for this many rows, best first; none where no table says.

        Args:
            op: the record's name.
            key: the fixed axes, as the op writes them.
            rows: how many.
        """
        entries = self.ops.get(op, {}).get(key, ())
        return next((names for most, names in entries if most is None or rows <= most), ())

    def merged(self, other: Plan) -> Plan:
        """This plan with another's tables over it, key by key.

        Raises:
            ConfigError: the other is for another architecture.
        """
        if other.architecture != self.architecture:
            raise ConfigError(
                "plans of two architectures cannot be merged",
                expected=self.architecture,
                got=other.architecture,
            )
        ops = {op: {**self.ops.get(op, {}), **other.ops.get(op, {})} for op in {*self.ops, *other.ops}}
        return Plan(self.architecture, ops)

    def write(self, path: Path) -> None:
        """Writes the file, a line per key, so that a change of one table is a change of one line.

        The old file stands until the new one is whole: an interruption loses neither.
        """
        lines = []
        for op, tables in sorted(self.ops.items()):
            rows = [
                f"      {json.dumps(key)}: {json.dumps(entries)}" for key, entries in sorted(tables.items())
            ]
            lines.append(f"    {json.dumps(op)}: {{\n" + ",\n".join(rows) + "\n    }")
        text = f'{{\n  "architecture": {json.dumps(self.architecture)},\n  "ops": {{\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(text + ",\n".join(lines) + "\n  }\n}\n")
        unfinished.replace(path)


def own_path(architecture: str) -> Path:
    """Where `isobatch tune` keeps the tables made on this machine."""
    return env.cache_dir() / f"plan-{architecture}.json"


def current(architecture: str) -> Plan:
    """The shipped tables, and over them those made on this machine.

    Raises:
        ConfigError: this machine's file is damaged.
    """
    own = own_path(architecture)
    return shipped(architecture).merged(read(own, architecture)) if own.exists() else shipped(architecture)


def bucket(rows: int) -> int:
    """The tuned row count that stands for this many rows."""
    return BUCKETS[min(bisect_left(BUCKETS, rows), len(BUCKETS) - 1)]


def buckets(most: int | None) -> tuple[int, ...]:
    """The tuned row counts that serve up to so many rows; None: all.

    Raises:
        ConfigError: no rows.
    """
    if most is None:
        return BUCKETS
    if most < 1:
        raise ConfigError("tables are for rows", expected="at least 1", got=most)
    return tuple(rows for rows in BUCKETS if rows <= bucket(most))


def table(
    tuned: Sequence[tuple[int, tuple[str, ...]]], standing: Callable[[], Sequence[Entry]]
) -> tuple[Entry, ...]:
    """A key's entries.

    Args:
        tuned: for the first of the tuned row counts, ascending. The last of all serves any number beyond.
        standing: asked, if these are not all, for the key's entries so far; those for more rows stay.
    """
    last = tuned[-1][0]
    if last == BUCKETS[-1]:
        return *tuned[:-1], (None, tuned[-1][1])
    return *tuned, *(entry for entry in standing() if entry[0] is None or entry[0] > last)


def read(path: Path, architecture: str) -> Plan:
    """Reads a plan file.

    Args:
        path: the file.
        architecture: of this machine.

    Raises:
        ConfigError: damaged, or for another architecture.
    """
    try:
        return _plan(json.loads(path.read_text()), str(path), architecture)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"cannot read the plan {path}", expected="JSON", got=error, fix="make it anew with isobatch tune"
        ) from error


@cache
def shipped(architecture: str) -> Plan:
    """The tables that come with the package; empty for an architecture that has none."""
    resource = files("isobatch.kernels.plans").joinpath(f"{architecture}.json")
    if not resource.is_file():
        return Plan(architecture)
    return _plan(json.loads(resource.read_text()), resource.name, architecture)


def _plan(content: Any, source: str, architecture: str) -> Plan:
    def wrong(what: str, expected: str, got: object) -> ConfigError:
        return ConfigError(
            f"{source}: {what}", expected=expected, got=repr(got), fix="make it anew with isobatch tune"
        )

    if not isinstance(content, dict) or set(content) != {"architecture", "ops"}:
        raise wrong("not a plan", "an object with architecture and ops", content)
    if content["architecture"] != architecture:
        raise wrong("a plan for another architecture", architecture, content["architecture"])
    if not isinstance(content["ops"], dict) or not all(isinstance(t, dict) for t in content["ops"].values()):
        raise wrong("bad ops", "tables by op", content["ops"])
    ops = {
        op: {
            key: tuple(_entry(entry, wrong) for entry in _list(entries, key, wrong))
            for key, entries in t.items()
        }
        for op, t in content["ops"].items()
    }
    return Plan(architecture, ops)


def _list(entries: Any, key: str, wrong: Any) -> list[Any]:
    if not isinstance(entries, list):
        raise wrong(f"bad table {key}", "a list", entries)
    return entries


def _entry(entry: Any, wrong: Any) -> Entry:
    match entry:
        case [int() | None as most, [*names]] if names and all(isinstance(name, str) for name in names):
            return most, tuple(names)
    raise wrong("bad entry", "[rows or null, [member, ...]]", entry)
