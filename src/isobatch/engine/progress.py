"""How far a long job is: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# Few enough not to fill a log, and no clock is asked.
_LINES = 4


class Bar:
    """Progress of one job on a console, inside a `with` block.

    Args:
        console: where to; usually stderr.
        what: the job.
        unit: what is counted.
        enabled: whether anything is shown.
    """

    def __init__(self, console: Console, what: str, unit: str, *, enabled: bool = True) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        on_terminal = enabled and console.is_terminal
        self._bar = Progress(
            *columns, TextColumn(unit), TimeElapsedColumn(), console=console, disable=not on_terminal
        )
        self._task = self._bar.add_task(what, total=None)
        self._console, self._what, self._unit = console, what, unit
        self._plain = enabled and not on_terminal
        self._lines = 0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Tells how much is done.

        Args:
            done: so far.
            total: in all, 1 or more.
        """
        self._bar.update(self._task, completed=done, total=total)
        lines = _LINES * done // total
        if self._plain and lines > self._lines:
            self._lines = lines
            line = f"{self._what}: {done} of {total} {self._unit}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
