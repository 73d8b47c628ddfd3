"""Typed look-ups in metadata that came from a file and may hold anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from isobatch.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


class Fields:
    """A mapping whose values are checked as they are taken out. A null counts as absent.

    Args:
        values: the metadata.
        source: what it was read from, for the messages.
    """

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values, self._source = values, source

    def has(self, name: str) -> bool:
        """Whether there is a value, and it is not null."""
        return self._values.get(name) is not None

    def is_list(self, name: str) -> bool:
        """Whether the value is a list."""
        return isinstance(self._values.get(name), list)

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """One value.

        Args:
            name: its key.
            kind: the type it must have. An int will do for a float; a bool never does for an int.
            default: what an absent value means; None if it must be there.

        Returns:
            The value.

        Raises:
            CheckpointError: absent without a default, of another type, or not a finite number.
        """
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self._source} has no {name!r}", expected=kind.__name__)
            return default
        return self._checked(name, value, kind)

    def items(self, name: str, kind: type[T]) -> list[T]:
        """A list of values, all of one type.

        Args:
            name: its key.
            kind: the type of every item.

        Returns:
            The items.

        Raises:
            CheckpointError: absent, not a list, or with an item of another type.
        """
        values = self._values.get(name)
        if not isinstance(values, list):
            raise CheckpointError(
                f"{self._source}: {name!r}", expected=f"a list of {kind.__name__}", got=type(values).__name__
            )
        return [self._checked(name, value, kind) for value in values]

    def mapping(self, name: str) -> dict[str, object]:
        """A nested mapping.

        Args:
            name: its key.

        Returns:
            The mapping; empty if absent.

        Raises:
            CheckpointError: something else.
        """
        value = self._values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{self._source}: {name!r}", expected="an object", got=repr(value)[:80])
        return value

    def _checked(self, name: str, value: object, kind: type[T]) -> T:
        if kind is float and type(value) is int:
            value = float(
                str(value)
            )  # by way of str, an int too large becomes inf rather than an OverflowError
        # type() and not isinstance(): True is an instance of int.
        if type(value) is not kind:
            raise CheckpointError(f"{self._source}: {name!r}", expected=kind.__name__, got=repr(value)[:80])
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{self._source}: {name!r}", expected="a finite number", got=value)
        return value


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}", expected="a JSON object", got=error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}", expected="a JSON object", got=type(content).__name__)
    return content
