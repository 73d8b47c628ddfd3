"""Which rows of a tensor are asked for: the one check of every kind of checkpoint."""

from __future__ import annotations

from isobatch.errors import IntegrityError


def checked_stop(name: str, start: int, stop: int | None, rows: int) -> int:
    """The row after the last.

    Args:
        name: of the tensor.
        start: the first row.
        stop: the row after the last; None for all that there are.
        rows: how many the tensor has.

    Raises:
        IntegrityError: not within the tensor.
    """
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise IntegrityError(f"rows of {name}", expected=f"within [0, {rows})", got=f"[{start}, {stop})")
    return stop
