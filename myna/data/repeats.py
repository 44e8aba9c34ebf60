"""Conversations that stand in rows twice, prompts with two answers, prompts of the test rows: by digests of 8 bytes.

A digest for the prompt, one for all of the conversation and a place are held of each, 24 bytes, and compared at the end. Of
ten million rows two that differ are taken for alike with a chance of 1 in 400,000.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from myna.data.check import SHOWN_PLACES
from myna.data.conversation import Conversation, Message, Place

LINE_BITS = 40  # of a place in 64 bits; the rest is the number of its file
AT_ONCE = 1 << 18
Alike = tuple[int, list[tuple[int, int]]]


class Digests:
    """Digests and places of conversations, in their order. `has_parts` where some are only a part of their row."""

    def __init__(self) -> None:
        self._prompts, self._wholes, self._places = array("Q"), array("Q"), array("Q")
        self._files: dict[str, int] = {}
        self._units: list[Any] = []
        self.has_parts = False

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, conversation: Conversation) -> None:
        hashed = blake2b(written(conversation.asked(), conversation.tools), digest_size=8)
        prompt = hashed.digest()
        hashed.update(
            prompt + written(conversation.messages[-1:])
        )  # the prompt parts what is asked from the answer
        self._prompts.frombytes(prompt)
        self._wholes.frombytes(hashed.digest())
        self._places.append(self._packed(conversation.place))

    def join(self, later: Digests) -> None:
        """Adds those of rows behind these, of the same file."""
        assert not self._files or not later._files or self._files == later._files
        if later._files:
            self._files, self._units = later._files, later._units
        self._prompts += later._prompts
        self._wholes += later._wholes
        self._places += later._places
        self.has_parts = self.has_parts or later.has_parts

    def place(self, index: int) -> Place | None:
        """Where a conversation stands; which part of its row it is, is not held."""
        packed = self._places[index]
        if packed == 0:
            return None
        number, line = packed >> LINE_BITS, packed & ((1 << LINE_BITS) - 1)
        return Place(list(self._files)[number], line, self._units[number])

    def repeated(self) -> Alike:
        """How many conversations stood there before, and the first of them, each with the one that it repeats."""
        import numpy as np

        wholes = np.frombuffer(self._wholes, np.uint64)
        return _first_of(wholes, _after_the_first(_shared(wholes), wholes))

    def contradicting(self) -> Alike:
        """How many prompts stood there before with another answer, and the first of them with that one."""
        import numpy as np

        wholes, prompts = np.frombuffer(self._wholes, np.uint64), np.frombuffer(self._prompts, np.uint64)
        repeated = _after_the_first(_shared(wholes), wholes)  # these contradict nothing more
        own = np.setdiff1d(_shared(prompts), repeated, assume_unique=True)
        return _first_of(prompts, _after_the_first(own, prompts))

    def standing_in(self, held_out: Digests) -> tuple[int, list[int]]:
        """How many prompts stand in `held_out` too, and the first of them."""
        import numpy as np

        if not len(self) or not len(held_out):
            return 0, []
        known = np.unique(np.frombuffer(held_out._prompts, np.uint64))
        prompts = np.frombuffer(self._prompts, np.uint64)
        count, first = 0, list[int]()
        for start in range(0, len(prompts), AT_ONCE):
            block = prompts[start : start + AT_ONCE]
            near = np.minimum(np.searchsorted(known, block), len(known) - 1)
            found = start + np.flatnonzero(known[near] == block)
            count += len(found)
            first += found[: SHOWN_PLACES - len(first)].tolist()
        return count, first

    def _packed(self, place: Place | None) -> int:
        if place is None:
            return 0
        number = self._files.get(place.path)
        if number is None:
            number = self._files[place.path] = len(self._files)
            self._units.append(place.unit)
        self.has_parts = self.has_parts or bool(place.part)
        return number << LINE_BITS | place.line


def _shared(digests: Any) -> Any:
    """The indices of digests that stand more than once, in their order. Takes 8 bytes of each, and more of those alone."""
    import numpy as np

    ordered = np.sort(digests)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(several):
        return np.zeros(0, np.int64)
    found = []
    for start in range(0, len(digests), AT_ONCE):
        block = digests[start : start + AT_ONCE]
        near = np.minimum(np.searchsorted(several, block), len(several) - 1)
        found.append(start + np.flatnonzero(several[near] == block))
    return np.concatenate(found)


def _after_the_first(indices: Any, digests: Any) -> Any:
    """Of indices in their order those before which one with the same digest stands."""
    import numpy as np

    own = digests[indices]
    order = np.argsort(own, kind="stable")
    ordered = own[order]
    return np.sort(indices[order[1:][ordered[1:] == ordered[:-1]]])


def _first_of(digests: Any, later: Any) -> Alike:
    """The first of `later`, indices in their order, each with the first index that has the same digest."""
    import numpy as np

    shown = [int(index) for index in later[:SHOWN_PLACES]]
    return len(later), [(index, int(np.argmax(digests == digests[index]))) for index in shown]


def written(messages: Sequence[Message], tools: Sequence[str] = ()) -> bytes:
    """The turns with their roles and the tools, as digests of them are taken of; ids of calls say nothing."""
    if len(messages) == 1 and not tools and not messages[0].calls:  # most answers, and most prompts
        return f"{messages[0].role}\x1f{messages[0].content}".encode(errors="surrogatepass")
    told = [f"{one.role}\x1f{one.text if one.calls else one.content}" for one in messages]
    text = "\x1e".join([*told, *tools] if tools else told)
    return text.encode(errors="surrogatepass")
