"""What `isobatch tune` has found, kept on disk as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from isobatch.cli import results
from isobatch.kernels import plan as plans
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.linear.tune import Trial


class Tables:
    """Tables and transcript on disk, written whenever there is something new.

    Args:
        path: of the plan, which may be there already.
        transcript: of what was tried, or None.
        architecture: of this GPU.

    Attributes:
        trials: of each shape, by ascending rows.

    Raises:
        ConfigError: the plan is damaged.
    """

    def __init__(self, path: Path, transcript: Path | None, architecture: str) -> None:
        self.path, self._transcript = path, transcript
        self._plan = plans.read(path, architecture) if path.exists() else plans.Plan(architecture)
        self._before = self._plan
        self.trials: dict[Shape, Sequence[Trial]] = {}

    def keep(self, shape: Shape, trials: Sequence[Trial]) -> None:
        """Keeps what was found for a shape, over what was known."""
        self.trials[shape] = trials
        table = plans.table([trial.entry() for trial in trials], partial(self._standing, shape.key))
        new = plans.Plan(self._plan.architecture, {"linear": {shape.key: table}})
        self._plan = self._plan.merged(new)
        self._plan.write(self.path)
        if self._transcript:
            told = {shape.key: _told(trials) for shape, trials in self.trials.items()}
            results.write(self._transcript, {"linear": told})

    def _standing(self, key: str) -> Sequence[plans.Entry]:
        """What tables said of a shape before: the file's own, or else those that serve on this machine."""
        tables = self._before.ops.get("linear", {})
        if key not in tables:
            tables = plans.current(self._plan.architecture).ops.get("linear", {})
        return tables.get(key, ())

    def by_key(self) -> dict[str, list[plans.Entry]]:
        """By key, the tables of all shapes that were tuned."""
        return {shape.key: list(self._plan.ops["linear"][shape.key]) for shape in self.trials}


def _told(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [
        {
            "rows": trial.rows,
            "torch_us": round(trial.torch_us, 2),
            "admitted_us": {member: round(us, 2) for member, us in trial.times},
            "refused": trial.refused,
            **({"steps_us": {member: round(us, 1) for member, us in trial.steps}} if trial.steps else {}),
        }
        for trial in trials
    ]
