"""The environment that a chat template runs in: jinja2's sandbox as transformers has it, with limits on time and text.

A template is a program of its author's. jinja2's sandbox keeps it from reaching out; nothing keeps it from looping for
a week or from writing a gigabyte, and a template of under 100 bytes can do both. Here

- every text and every collection that a template makes is charged by its size, and beforehand where one step could make
  it large (`*`, `%`, padding, `replace`, `join`, …), so memory is bounded by what a rendering may make in all;
- every turn of a loop and every call is a step, and each so many steps the processor time of this thread is looked at. It is
  not the clock: a machine that sleeps or is busy refuses nothing;
- filters are those of a short list. What is missing has no use in a chat template and no bound.

All of it happens in this thread, without signals, so it works off the main thread and on every system.
"""

from __future__ import annotations

import functools
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from myna.data.sandbox_code import TURNS, ChargedCode
from myna.data.sandbox_filters import (
    CHECKS,
    FILTERS,
    ITEM,
    MAX_WIDTH,
    OWN_FILTERS,
    PlainNamespace,
    check_spec,
    check_width,
    raise_exception,
    strftime_now,
    text_bytes,
)

SECONDS = 0.5  # processor time of one rendering; a conversation of 1,000 messages takes 0.01
ROOM = 4_000_000  # bytes of text a rendering may make in all, pieces of pieces counted again,
ROOM_PER_BYTE = 512  # and so many more for each byte of the conversation it is given
COMPILE_ROOM = 1_000_000  # bytes: constants are computed when a template is compiled
STEPS = 32  # between two looks at the time
SHORT = 256  # items of a list that a loop runs over without one
MAX_BITS = 10_000  # of an integer

# Methods of text that are not given: what they make is no text, or can't be bounded.
NO_METHODS = frozenset({"encode", "translate", "maketrans", "expandtabs"})


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """One template's environment. It holds the account of the one rendering that runs (`ChatTemplate` sees to that)."""

    code_generator_class = ChargedCode
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.start({}, COMPILE_ROOM)
        self.filters = {name: self._bounded_filter(name, FILTERS[name]) for name in FILTERS}
        self.filters[TURNS] = self.turns
        self.tests["divisibleby"] = lambda value, number: self.call_binop(None, "%", value, number) == 0
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *items, **named: self.made(dict(*items, **named)),
            "namespace": PlainNamespace,
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    # The account

    def start(self, given: Mapping[str, Any], room: int = ROOM) -> None:
        self.room = room
        self.steps = STEPS
        self.until: float | None = None
        self.given: Mapping[str, Any] | None = given

    def step(self) -> None:
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

    def charge(self, num_bytes: int) -> None:
        self.room -= num_bytes
        if self.room < 0:
            self._more_room()

    def _more_room(self) -> None:
        """The room that the conversation gives is added when the first is used up: most renderings never count it."""
        given, self.given = self.given, None
        if given:
            before = self.room
            self.room = 1 << 60
            self._weigh(given)
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
            self._weigh(value)
        return value

    def sliced(self, value: Any) -> Any:
        """A part of a text or list: its own bytes are charged, what is in it was before."""
        self.step()
        self.charge(ITEM * len(value) if isinstance(value, list | tuple) else text_bytes(value))
        return value

    def _weigh(self, value: Any) -> None:
        """Charges a collection as if it were written out: one that holds itself twice, twenty times over, is large."""
        stack = [value]
        while stack:
            top = stack.pop()
            if isinstance(top, str | bytes):
                self.charge(text_bytes(top))
            elif isinstance(top, dict):
                self.charge(2 * ITEM * len(top))
                stack.extend(top)
                stack.extend(top.values())
            elif isinstance(top, list | tuple | set | frozenset):
                self.charge(ITEM * len(top))
                stack.extend(top)

    # What templates do

    def turns(self, iterable: Iterable[Any]) -> Iterable[Any]:
        """What a loop runs over, with each turn counted; a short list at once."""
        self.step()
        if type(iterable) is list and len(iterable) <= SHORT:
            self.steps -= len(iterable)
            return iterable
        return self._counted_turns(iterable)

    def _counted_turns(self, iterable: Iterable[Any]) -> Iterator[Any]:
        left = STEPS
        for item in iterable:
            left -= 1
            if left < 0:
                left = STEPS
                self.look()
            yield item

    def concat(self, pieces: Iterable[str]) -> str:
        """What macros and blocks give back: jinja2 joins their pieces with this."""
        parts = pieces if isinstance(pieces, list) else list(pieces)
        self.charge(sum(map(text_bytes, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self.check_percent(left, right)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and not isinstance(one, int | float):
                    self.charge(max(0, other) * max(1, text_bytes(one)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * max(0, right))
        if operator != "%" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        return self.made(self.binop_table[operator](left, right))

    @staticmethod
    def _check_bits(bits: int) -> None:
        if bits > MAX_BITS:
            raise SecurityError("it computes with numbers beyond all use")

    def check_percent(self, text: str, values: Any) -> None:
        """`%` formatting without widths that are long or come from a value."""
        for part in text.split("%")[1:]:
            spec = part[: len(part) - len(part.lstrip("#0- +.*123456789"))]
            check_spec(spec)
        self.charge(text_bytes(text))
        for value in values if isinstance(values, tuple) else (values,):
            self.made(value)

    def call(__self, __context: Any, __callable: Any, *args: Any, **named: Any) -> Any:
        __self.step()
        owner = getattr(__callable, "__self__", None)
        if isinstance(owner, str):
            args = __self._bounded_arguments(owner, __callable.__name__, args)
        return __self.made(super().call(__context, __callable, *args, **named))

    def _bounded_arguments(self, text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Charges a method of text by what it will make; an iterable is read for that, so it comes back as a list."""
        self.charge(text_bytes(text))
        if method in ("center", "ljust", "rjust", "zfill"):
            check_width(*args[:1])
        elif method == "replace" and len(args) > 1:
            self.charge(text.count(*args[:1]) * text_bytes(args[1]))
        elif method == "join" and args:
            return ([*self.joined(text, args[0])],)
        elif method in ("split", "rsplit", "splitlines"):
            separated = bool(args) and isinstance(args[0], str) and bool(args[0])
            self.charge(ITEM * (text.count(args[0]) + 1 if separated else len(text)))
        return args

    def joined(self, separator: str, items: Iterable[Any]) -> list[Any]:
        found = []
        for item in self.turns(items):
            self.charge(text_bytes(separator) + text_bytes(item) + ITEM)
            found.append(item)
        return found

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes | type) or (isinstance(obj, str) and attr in NO_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = str(value.__self__)

        def bounded(*args: Any, **named: Any) -> str:
            fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
            for _, _, spec, _ in fields:
                check_spec((spec or "").replace("{", "*"))
            largest = max((text_bytes(v) for v in (*args, *named.values())), default=0)
            self.charge(text_bytes(text) + len(fields) * (largest + MAX_WIDTH))
            return wrapped(*args, **named)

        return functools.update_wrapper(bounded, value)

    def _bounded_filter(self, name: str, rate: int) -> Callable[..., Any]:
        plain: Callable[..., Any] = OWN_FILTERS.get(name) or jinja2.filters.FILTERS[name]
        first = 1 if hasattr(plain, "jinja_pass_arg") else 0
        check = CHECKS.get(name)

        @functools.wraps(plain)
        def bounded(*args: Any, **named: Any) -> Any:
            self.step()
            value = args[first]
            if rate and isinstance(value, str | list | tuple | dict):
                self.charge(rate * (text_bytes(value)))
            if check is not None:
                check(self, value, *args[first + 1 :], **named)
            return self.made(plain(*args, **named))

        return bounded
