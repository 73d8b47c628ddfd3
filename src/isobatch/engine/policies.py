"""Who goes first, how much at once, who gives way. Policies decide when a token is computed, never which."""

from __future__ import annotations

import random
from typing import Protocol

from isobatch.engine.request import Sequence
from isobatch.errors import ConfigError, UnknownKeyError

_PATIENCE = 4
_WHIM = 1 / 8


class Policy(Protocol):
    """What a scheduler leaves open.

    Determinism: no bit of any reply depends on an answer given here.
    """

    def rank(self, sequence: Sequence) -> tuple[int, float]:
        """Return the key that running and waiting sequences are served by in this step, lowest first."""

    def chunk(self, sequence: Sequence, most: int) -> int:
        """Return how many tokens to compute now, 1 to `most`."""

    def drafts(self, sequence: Sequence, most: int) -> int:
        """Return how many guessed tokens to compute behind the chunk, 0 to `most`, which is 1 or more."""

    def interrupts(self, sequence: Sequence) -> bool:
        """Whether a running sequence loses its blocks before this step, though nobody needs them."""

    def victim(self, candidates: list[Sequence]) -> Sequence:
        """Return the one of these running sequences that gives its blocks up, for another cannot go on."""


class FirstComeFirstServed:
    """Decoding first, then prompts in order of arrival, as much as fits; the latest arrival gives way."""

    def rank(self, sequence: Sequence) -> tuple[int, float]:
        """Decoding sequences come first: they cost little, and somebody is reading along."""
        decodes = sequence.computed > 0 and sequence.remaining == 1
        return (int(not decodes), sequence.arrival)

    def chunk(self, sequence: Sequence, most: int) -> int:
        """Everything that fits."""
        return most

    def drafts(self, sequence: Sequence, most: int) -> int:
        """All that there are."""
        return most

    def interrupts(self, sequence: Sequence) -> bool:
        """Never."""
        return False

    def victim(self, candidates: list[Sequence]) -> Sequence:
        """The latest arrival."""
        return max(candidates, key=lambda sequence: sequence.arrival)


class Chaos:
    """Everything at random, to show that nothing depends on it: order, chunks, preemptions, victims.

    It ends all the same. A sequence preempted `_PATIENCE` times is calm from then on: no whim interrupts it,
    it ranks before everyone who is not calm, in order of arrival, and among victims it comes last. So each of
    finitely many sequences is preempted only so often before it is calm, the calm are served first come first
    served, and every chunk has at least one token.

    Args:
        seed: the same seed and the same calls give the same decisions.
    """

    def __init__(self, seed: int) -> None:
        # Its own generator: nobody else's draws move it, and it moves nobody else's.
        self._random = random.Random(seed)

    def rank(self, sequence: Sequence) -> tuple[int, float]:
        """The calm by arrival, then the others shuffled anew each step."""
        if _is_calm(sequence):
            return (0, sequence.arrival)
        return (1, self._random.random())

    def chunk(self, sequence: Sequence, most: int) -> int:
        """Any length."""
        return self._random.randint(1, most)

    def drafts(self, sequence: Sequence, most: int) -> int:
        """Any number, none included."""
        return self._random.randint(0, most)

    def interrupts(self, sequence: Sequence) -> bool:
        """On a whim, unless the sequence is calm."""
        return not _is_calm(sequence) and self._random.random() < _WHIM

    def victim(self, candidates: list[Sequence]) -> Sequence:
        """Anyone who is not calm; failing that, the latest arrival."""
        return max(candidates, key=self.rank)


def policy_from_name(name: str) -> Policy:
    """Make the policy that a setting names.

    Args:
        name: `fcfs`, or `chaos:SEED` with an integer.

    Returns:
        The policy.

    Raises:
        UnknownKeyError: no policy of that name.
        ConfigError: a seed that is no integer.
    """
    if name == "fcfs":
        return FirstComeFirstServed()
    kind, colon, seed = name.partition(":")
    if kind != "chaos" or not colon:
        raise UnknownKeyError("scheduling policy", name, ["fcfs", "chaos:SEED"])
    try:
        return Chaos(int(seed))
    except ValueError:
        raise ConfigError(
            "the chaos policy's seed is no integer", expected="chaos:SEED", got=name, fix="try chaos:1"
        ) from None


def _is_calm(sequence: Sequence) -> bool:
    return sequence.preemptions >= _PATIENCE
