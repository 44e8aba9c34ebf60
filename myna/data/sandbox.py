"""The environment that a chat template runs in: jinja2's sandbox as transformers has it, with limits on time and text.

A template is a program of its author's. jinja2's sandbox keeps it from reaching out; nothing keeps it from looping for
a week or from writing a gigabyte, and a template of under 100 bytes can do both. Here

- every text and every collection that a template makes is charged by its size, and beforehand where one step could make
  it large (`*`, `%`, padding, `replace`, `join`, …), so memory is bounded by what a rendering may make in all;
- every turn of a loop, every call and every comparison is a step, and each so many steps the processor time of this
  thread is looked at. It is not the clock: a machine that sleeps or is busy refuses nothing;
- filters, methods of text and kinds of values are those of short lists. What is missing has no use in a chat template
  and no bound.

All of it happens in this thread, without signals, so it works off the main thread and on every system.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from myna.data.sandbox_account import MAX_BITS, WRITTEN, Account, text_bytes
from myna.data.sandbox_code import COMPARED, TURNS, ChargedCode
from myna.data.sandbox_filters import (
    ATTRIBUTES,
    CHECKS,
    LIST_FILTERS,
    LIST_RATE,
    OWN_FILTERS,
    PLAIN_FILTERS,
    TEXT_FILTERS,
    PlainNamespace,
    check_attribute,
    raise_exception,
    strftime_now,
)
from myna.data.sandbox_text import TEXT_METHODS, charge_format, charge_method, charge_percent

COMPILE_ROOM = 1_000_000  # bytes: constants are computed when a template is compiled
COMPARISONS = (
    *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan"),
    *("<=", "le", "lower", "upper"),
)


class Generation(Extension):
    """`{% generation %}`, by which transformers marks assistant text: here a block with a scope of its own, as there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class BoundedEnvironment(Account, ImmutableSandboxedEnvironment):
    """One template's environment. It holds the account of the one rendering that runs (`ChatTemplate` sees to that)."""

    code_generator_class = ChargedCode
    intercepted_binops = frozenset({"*", "**", "%", "-"})

    def __init__(self) -> None:
        # not optimized: jinja2 would compute constants of a filter's filter's … filter anew for each of them
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, Generation]
        )
        self.start({}, COMPILE_ROOM)
        self.filters = {
            name: self._bounded_filter(name) for name in (*PLAIN_FILTERS, *TEXT_FILTERS, *LIST_FILTERS)
        }
        self.filters |= {TURNS: self.turns, COMPARED: self.compared}
        self.tests.update({name: self._bounded_test(name) for name in COMPARISONS})
        self.tests["divisibleby"] = lambda value, number: self.call_binop(None, "%", value, number) == 0
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *items, **named: self.made(dict(*items, **named)),
            "namespace": PlainNamespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    def concat(self, pieces: Iterable[str]) -> str:
        """What macros and blocks give back: jinja2 joins their pieces with this."""
        parts = pieces if isinstance(pieces, list) else list(pieces)
        self.charge(sum(map(text_bytes, parts)))
        return "".join(parts)

    def together(self, parts: tuple[Any, ...]) -> str:
        """a ~ b ~ c, charged."""
        text = "".join([part if type(part) is str else self.written(part) for part in parts])
        self.charge(len(text) if text.isascii() else 4 * len(text))
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            charge_percent(self, left, right)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and not isinstance(one, int | float):
                    self.charge(max(0, other) * max(1, text_bytes(one)))
        elif operator == "-" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError("it subtracts what is no number")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * max(0, right))
        if operator != "%" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        return self.made(self.binop_table[operator](left, right))

    @staticmethod
    def _check_bits(bits: int) -> None:
        if bits > MAX_BITS:
            raise SecurityError("it computes with numbers beyond all use")

    def call(__self, __context: Any, __callable: Any, *args: Any, **named: Any) -> Any:
        __self.step()
        owner = getattr(__callable, "__self__", None)
        if isinstance(owner, str):
            args = charge_method(__self, owner, __callable.__name__, args, named)
        elif isinstance(__callable, Macro):
            if __callable.catch_varargs or __callable.catch_kwargs:
                __self.weigh((args, named))  # it gets them as a collection
        elif owner is not None and not isinstance(owner, dict):
            __self.look()  # a list seeks through itself
        return __self.made(super().call(__context, __callable, *args, **named))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes | type) or (isinstance(obj, str) and attr not in TEXT_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = str(value.__self__)

        def bounded(*args: Any, **named: Any) -> str:
            charge_format(self, text, (*args, *named.values()))
            return wrapped(*args, **named)

        return functools.update_wrapper(bounded, value)

    def _bounded_filter(self, name: str) -> Callable[..., Any]:
        plain: Callable[..., Any] = OWN_FILTERS.get(name) or jinja2.filters.FILTERS[name]
        first = 1 if hasattr(plain, "jinja_pass_arg") else 0
        check, attribute = CHECKS.get(name), ATTRIBUTES.get(name)
        charge = (
            self._charge_text if name in TEXT_FILTERS else self._charge_list if name in LIST_FILTERS else None
        )

        @functools.wraps(plain)
        def bounded(*args: Any, **named: Any) -> Any:
            self.step()
            value = args[first]
            if charge is not None:
                charge(value)
            if attribute is not None:
                check_attribute(*args[first + attribute : first + attribute + 1], named.get("attribute"))
            if check is not None:
                check(self, value, *args[first + 1 :], **named)
            made = plain(*args, **named)
            return self.counted(made) if hasattr(made, "__next__") else self.made(made)

        return bounded

    def _charge_text(self, value: Any) -> None:
        if isinstance(value, str):
            self.compared(value)
            self.charge(text_bytes(value))
        else:
            self.weigh(value, WRITTEN)

    def _charge_list(self, value: Any) -> None:
        self.compared(value)
        if isinstance(value, str | list | tuple | dict):
            self.charge(LIST_RATE * text_bytes(value))

    def _bounded_test(self, name: str) -> Callable[..., Any]:
        plain: Any = jinja2.tests.TESTS[name]

        def bounded(value: Any, *others: Any) -> Any:
            self.compared(value)
            for other in others:
                self.compared(other)
            return plain(value, *others)

        return bounded
