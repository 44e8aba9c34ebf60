"""The account of one rendering: how much text and how many items it may make, and how long it may take (see sandbox.py).

Nothing that a template can reach changes once it is made, so each collection is charged once, by all that is in it. What
later walks through it natively (`==`, `str`, sorting) is then bounded by the same room.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from types import GeneratorType, NoneType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import Namespace

SECONDS = 0.5  # processor time of one rendering; a conversation of 1,000 messages takes 0.01
ROOM = 4_000_000  # bytes of text a rendering may make in all, pieces of pieces counted again,
ROOM_PER_BYTE = 512  # and so many more for each byte of the conversation it is given
STEPS = 32  # between two looks at the time
SHORT = 256  # items of a list that a loop runs over without one
STEP_BITS = 10  # 2 ** 10 characters that are looked through are a step
MAX_BITS = 10_000  # of an integer
ITEM = 16  # what an item of a collection is charged
WRITTEN = 4  # times the size of a collection that it may have as text: a character can become ten

COLLECTIONS: Any = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
# What has nothing in it that is compared or written with it. A namespace can change: it is never written out.
ATOMS = (int, float, NoneType, Undefined, Namespace, range, Macro, LoopContext, GeneratorType)


def text_bytes(value: Any) -> int:
    """About what a text takes in memory; of a collection, of its items' places alone."""
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    if isinstance(value, list | tuple | dict | bytes):
        return ITEM * len(value)
    return ITEM


class Account:
    """What one rendering has left of room and time."""

    def start(self, given: Mapping[str, Any], room: int = ROOM) -> None:
        """Begins a rendering that is given these variables."""
        self.room = room
        self.steps = STEPS
        self.until: float | None = None
        self.given: Mapping[str, Any] | None = given

    # Time

    def step(self) -> None:
        """SecurityError where the time is over; looked at each STEPS steps."""
        self.steps -= 1
        if self.steps < 0:
            self.look()

    def look(self) -> None:
        """At the time. It counts from the first look, so that short renderings need none."""
        self.steps = STEPS
        now = time.thread_time()
        if self.until is None:
            self.until = now + SECONDS
        if now > self.until:
            raise SecurityError(f"it takes longer than {SECONDS:g} s")

    def compared(self, value: Any) -> Any:
        """A value that is compared or looked through next, counted by what that may take."""
        if isinstance(value, str):
            self.steps -= 1 + (len(value) >> STEP_BITS)
            if self.steps < 0:
                self.look()
        elif not isinstance(value, ATOMS):
            self.look()
        return value

    def turns(self, iterable: Iterable[Any]) -> Iterable[Any]:
        """What a loop runs over, with each turn counted; a short list at once."""
        self.step()
        if type(iterable) is list and len(iterable) <= SHORT:
            self.steps -= len(iterable)
            return iterable
        return self.counted(iterable)

    def counted(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """Its items, with a look at the time each STEPS of them."""
        left = STEPS
        for item in iterable:
            left -= 1
            if left < 0:
                left = STEPS
                self.look()
            yield item

    # Room

    def charge(self, num_bytes: int) -> None:
        """SecurityError where there is no room for so much more."""
        self.room -= num_bytes
        if self.room < 0:
            self._more_room()

    def _more_room(self) -> None:
        """The room that the conversation gives is added when the first is used up: most renderings never count it."""
        given, self.given = self.given, None
        if given:
            before = self.room
            self.room = 1 << 60
            self.weigh(given)
            self.room = before + ROOM_PER_BYTE * ((1 << 60) - self.room)
        if self.room < 0:
            raise SecurityError("it makes more text than a conversation could need")

    def made(self, value: Any) -> Any:
        """A value that the template made, charged: text by its bytes, a collection by all that is in it."""
        if type(value) is str:
            self.room -= len(value) if value.isascii() else 4 * len(value)
            if self.room < 0:
                self._more_room()
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise SecurityError("it computes with numbers beyond all use")
        elif value is not None:
            self.weigh(value)
        return value

    def written(self, value: Any) -> str:
        """A value as the text that the template writes; a collection is charged before."""
        if type(value) is str:
            return value
        self.weigh(value, WRITTEN)
        return str(value)

    def sliced(self, value: Any) -> Any:
        """A part of a text or list: its own bytes are charged, what is in it was before."""
        self.step()
        self.charge(ITEM * len(value) if isinstance(value, list | tuple) else text_bytes(value))
        return value

    def weigh(self, value: Any, times: int = 1) -> None:
        """Charges a value as if it were written out: one that holds itself twice, twenty times over, is large.

        SecurityError for what is not known to have an end.
        """
        stack = [value]
        while stack:
            top = stack.pop()
            if isinstance(top, str):
                self.charge(times * (len(top) if top.isascii() else 4 * len(top)))
            elif isinstance(top, dict):
                self.charge(times * 2 * ITEM * len(top))
                stack.extend(top)
                stack.extend(top.values())
            elif isinstance(top, COLLECTIONS):
                self.charge(times * ITEM * len(top))
                stack.extend(top)
            elif not isinstance(top, ATOMS):
                raise SecurityError(f"it keeps or writes a {type(top).__name__}, which is no value")
            elif isinstance(top, int) and top.bit_length() > 64:
                self.charge(times * top.bit_length())
