"""Drafts: tokens that a request may well say next, guessed from what it has said already. Plain Python.

A text that repeats itself, or its prompt, goes on as it did the last time. So the written rule is:

- Take the last three tokens, and find where they last stood before; failing that, the last two. The drafts
  are the tokens that followed there. Where that runs into the end of the text it goes on with the drafts
  themselves, so that a text with a period is continued for as long as is wanted.
- A token was foretold if it is the first draft of the tokens before it. There are at most as many drafts as
  twice the tokens that were foretold in an unbroken row up to the last, and one more: a text that does not
  repeat itself costs a row here and there, one that does is soon drafted in full.

A draft decides what is computed, and never what is said: a token is drawn as it would be without, and drafts
that differ from it are dropped. So the rule may be as wrong as it likes.

Source: drafts looked up in the prompt are Apoorv Saxena's "Prompt Lookup Decoding" (2023); that they can be
verified in one pass, Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Iterable

# The most telling first. Single tokens recur all the time and foretell little.
_LENGTHS = (3, 2)


class Drafter:
    """The tokens of one text, and where they can be looked up; a token costs the same however many there are.

    Determinism: drafts depend on the tokens alone, and not on the pieces in which they came.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # For each run of tokens the place that followed it, the last time that anything did.
        self._after: dict[tuple[int, ...], int] = {}
        self._foretold = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Takes in the tokens that come next.

        Args:
            tokens: their ids, 0 or more.
        """
        known, after = self._tokens, self._after
        for token in tokens:
            expected = self._source()
            foretold = expected is not None and known[expected] == token
            self._foretold = self._foretold + 1 if foretold else 0
            for length in _LENGTHS:
                if len(known) >= length:
                    after[tuple(known[-length:])] = len(known)
            known.append(token)

    def propose(self, most: int) -> tuple[int, ...]:
        """Guesses the tokens that follow.

        Args:
            most: no more than this many.

        Returns:
            Their ids, none if the text's end is new.
        """
        start = self._source()
        if start is None:
            return ()
        period = len(self._tokens) - start
        count = min(most, 2 * self._foretold + 1)
        return tuple(self._tokens[start + at % period] for at in range(count))

    def _source(self) -> int | None:
        """The place of the token that followed the last time."""
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                place = self._after.get(tuple(self._tokens[-length:]))
                if place is not None:
                    return place
        return None
