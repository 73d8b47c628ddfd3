"""The weights of a layer's experts, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

W = TypeVar("W")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Experts(Generic[W, S]):
    """A router and E MLPs, as kernels want their weights: a `Weight` and two of `Stack`.

    Args:
        router: [E, K].
        gate_up: [2 I, K] of each expert, gates above ups.
        down: [K, I] of each.
        active: experts per token.
        renormalise: whether a token's weights are shares of its chosen experts; otherwise of all.
    """

    router: W
    gate_up: S
    down: S
    active: int
    renormalise: bool = True
