"""Rows that stand twice, and prompts with two answers: the digests find what a plain comparison finds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data import repeats
from myna.data.conversation import Conversation, Message, Place
from myna.data.repeats import Digests

TALKS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=30)


def talk(number: int, prompt: str, answer: str) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer)), Place("a.jsonl", number + 1))


def digests(talks: list[tuple[str, str]]) -> Digests:
    made = Digests()
    for number, (prompt, answer) in enumerate(talks):
        made.add(talk(number, prompt, answer))
    return made


@given(TALKS, TALKS)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("at_once", [2, 1 << 18])
def test_they_are_those_of_a_plain_comparison(
    at_once: int, talks: list[tuple[str, str]], others: list[tuple[str, str]]
) -> None:
    before, repeats.AT_ONCE = repeats.AT_ONCE, at_once
    try:
        found = digests(talks)
        later = [n for n, one in enumerate(talks) if one in talks[:n]]
        wanted = [(n, talks.index(talks[n])) for n in later[:3]]
        assert found.repeated() == (len(later), wanted)
        prompts = [prompt for prompt, _ in talks]
        own = [n for n, (prompt, _) in enumerate(talks) if n not in later and prompt in prompts[:n]]
        assert found.contradicting() == (len(own), [(n, prompts.index(prompts[n])) for n in own[:3]])
        held_out = {prompt for prompt, _ in others}
        asked = [n for n, prompt in enumerate(prompts) if prompt in held_out]
        assert found.standing_in(digests(others)) == (len(asked), asked[:3])
    finally:
        repeats.AT_ONCE = before
    assert [found.place(n) for n in range(len(talks))] == [Place("a.jsonl", n + 1) for n in range(len(talks))]
