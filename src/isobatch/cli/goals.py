"""Goals of a bench: a figure, what it should be, and whether it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Point = dict[str, Any]
"""One measurement: op, shape, rows, microseconds of both sides, their ratio, and the floor."""

Goal = dict[str, Any]
"""what, value, goal, met."""


def at_most(what: str, value: float, goal: float) -> Goal:
    """A figure that should not be larger."""
    return {"what": what, "value": value, "goal": goal, "met": value <= goal}


def at_least(what: str, value: float, goal: float) -> Goal:
    """A figure that should not be smaller."""
    return {"what": what, "value": value, "goal": goal, "met": value >= goal}


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios: that of a ratio and its inverse is 1."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
