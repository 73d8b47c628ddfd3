"""Exact rounding, by rational arithmetic: what one IEEE operation must give."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def round32(exact: Fraction) -> np.float32:
    """The float32 nearest to a rational number, ties to even; for results in the normal range."""
    near = np.float32(float(exact))  # at most one step off: rounding twice can miss by a tie
    steps = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    best = min(abs(Fraction(float(s)) - exact) for s in steps)
    tied = [s for s in steps if abs(Fraction(float(s)) - exact) == best]
    return next(s for s in tied if len(tied) == 1 or int(s.view(np.int32)) % 2 == 0)


def fma32(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c, rounded once."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return round32(exact) if exact else np.float32(0)
