"""Conversations that are too many to hold lie on disk and are the same when they come back."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import ROLES, Conversation, Message, Place
from myna.data.spool import Chosen, Spool

MESSAGES = st.builds(Message, st.sampled_from(ROLES), st.text(), st.booleans())
PLACES = st.none() | st.builds(
    Place, st.text(), st.integers(0, 2**40), st.sampled_from(["line", "row"]), st.text()
)
CONVERSATIONS = st.builds(Conversation, st.lists(MESSAGES, min_size=1, max_size=3).map(tuple), PLACES)


@given(st.lists(CONVERSATIONS, max_size=12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out(conversations: list[Conversation], held: int) -> None:
    spool = Spool(held=held)
    half = len(conversations) // 2
    spool.extend(conversations[:half])
    assert list(spool) == conversations[:half]  # read between, and written on
    spool.extend(conversations[half:])
    assert len(spool) == len(conversations)
    assert list(spool) == conversations == [spool[n] for n in range(len(spool))]
    assert list(spool[1:3]) == conversations[1:3]
    assert list(Chosen(spool, array("Q", range(len(spool)))[::-1])) == conversations[::-1]
    if conversations:
        assert spool[-1] == conversations[-1]


def test_most_of_it_is_not_in_memory() -> None:
    spool = Spool(held=10)
    for n in range(5000):
        spool.append(
            Conversation((Message("user", f"{n} " + "x" * 1000), Message("assistant", "a")), Place("a", n))
        )
    assert len(spool._held) == 10 and spool._num_unwritten < 1 << 20
    both = zip(spool, range(5000), strict=True)
    assert all(c.messages[0].content.startswith(f"{n} ") for c, n in both)
