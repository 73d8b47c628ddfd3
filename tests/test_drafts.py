"""Drafts: the written rule, replayed the slow way; in pieces as in one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.engine.drafts import Drafter

Tokens = tuple[int, ...]
# Few ids, so that runs of tokens recur; some texts with a period, as drafts are good for.
_TEXTS = st.lists(st.integers(0, 3), max_size=60) | st.builds(
    lambda head, period, times, tail: head + period * times + tail,
    st.lists(st.integers(0, 9), max_size=9),
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.integers(1, 9),
    st.lists(st.integers(0, 9), max_size=3),
)


def drafter(*pieces: list[int] | Tokens) -> Drafter:
    made = Drafter()
    for piece in pieces:
        made.extend(piece)
    return made


def followed(text: list[int]) -> int | None:
    """The place after the latest earlier occurrence of the last three tokens, or of the last two."""
    for length in (3, 2):
        end = text[-length:]
        for at in reversed(range(len(text) - length)):
            if len(end) == length and text[at : at + length] == end:
                return at + length
    return None


def written_rule(text: list[int], most: int) -> Tokens:
    row = 0
    for at, token in enumerate(text):
        place = followed(text[:at])
        row = row + 1 if place is not None and text[place] == token else 0
    place, said = followed(text), list(text)
    if place is not None:
        for at in range(place, place + min(most, 2 * row + 1)):
            said.append(said[at])
    return tuple(said[len(text) :])


@given(text=_TEXTS, most=st.integers(1, 12))
def test_drafts_are_those_of_the_written_rule(text: list[int], most: int) -> None:
    assert drafter(text).propose(most) == written_rule(text, most)


@given(text=_TEXTS, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_drafts_do_not_depend_on_the_pieces(text: list[int], cuts: list[int]) -> None:
    pieces = drafter()
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 99], strict=True):
        pieces.extend(text[start:stop])
        pieces.propose(4)
    assert len(pieces) == len(text)
    assert pieces.propose(9) == drafter(text).propose(9)


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ((), ()),
        ((1, 1), ()),  # the end itself is no earlier occurrence
        ((1, 2, 3, 4, 1, 2), (3,)),
        ((1, 2, 3, 4, 1, 2, 3), (4, 1, 2)),  # 3 was foretold
        ((1, 2, 3, 4, 1, 2, 3, 4), (1, 2, 3, 4, 1)),
        ((1, 2, 3, 4, 1, 2, 3, 5), ()),
        ((1, 2, 3, 9, 2, 3, 8, 1, 2, 3), (9, 2, 3)),  # three tokens tell more than two that are nearer
        ((4, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3), (8,)),  # of two occurrences the later
        ((7,) * 9, (7,) * 8),  # the drafts go on with themselves
        ((1, 2) * 5, (1, 2) * 4),
    ],
)
def test_rule_by_example(text: Tokens, drafts: Tokens) -> None:
    assert drafter(text).propose(8) == drafts


def test_a_token_looks_at_few_others() -> None:
    """However long the text: what `extend` and `propose` read of it is counted."""

    class Counted(list[int]):
        reads = 0

        def __getitem__(self, key: int | slice) -> int | list[int]:  # type: ignore[override]
            found = super().__getitem__(key)
            Counted.reads += len(found) if isinstance(found, list) else 1
            return found

    def reads(length: int) -> int:
        made = Drafter()
        made._tokens = Counted()
        made.extend(at * at % 1009 for at in range(length))
        Counted.reads = 0
        made.extend((5, 6, 7, 8))
        made.propose(4)
        return Counted.reads

    assert max(reads(100), reads(20_000)) < 60
