"""Filters and functions that chat templates have, each with what bounds it (see sandbox.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from myna.data.sandbox_account import WRITTEN, Account, text_bytes
from myna.data.sandbox_text import charge_percent, check_sought, check_width, joined

LIST_RATE = 32  # times the size of a collection that the filters of collections are charged
MAX_ATTRIBUTE = (100, 8)  # characters and dots of an attribute's name
# Filters that look at the ends alone, or are charged by what they give; those that write what they are given as text;
# and those that go through a collection.
PLAIN_FILTERS = (
    "default",
    "d",
    "length",
    "count",
    "first",
    "last",
    "abs",
    "attr",
    "int",
    "float",
    "round",
    "tojson",
    "join",
)
TEXT_FILTERS = (
    *("trim", "lower", "upper", "capitalize", "string", "escape", "e", "safe", "truncate", "forceescape"),
    *("replace", "indent", "center", "format", "title", "wordcount"),
)
LIST_FILTERS = (
    *("list", "sort", "unique", "dictsort", "sum", "min", "max", "batch", "slice", "items", "reverse"),
    *("map", "select", "reject", "selectattr", "rejectattr", "groupby"),
)
# The place of a filter's argument that names an attribute: each of its dots is a step, for each item.
ATTRIBUTES: Mapping[str, int] = {
    **dict.fromkeys(("map", "selectattr", "rejectattr", "groupby", "sum"), 1),
    **dict.fromkeys(("join", "unique", "min", "max"), 2),
    "sort": 3,
}


class PlainNamespace(Namespace):
    """jinja2's namespace without names that Python gives a meaning, as transformers has it."""

    def __init__(*args: Any, **named: Any) -> None:
        self, values = args[0], dict(*args[1:], **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        raise SecurityError("it writes a namespace out")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


def check_attribute(*names: Any) -> None:
    """SecurityError for an attribute's name that is a long way down."""
    for name in names:
        if isinstance(name, str) and (len(name) > MAX_ATTRIBUTE[0] or name.count(".") > MAX_ATTRIBUTE[1]):
            raise SecurityError("it takes an attribute by a name beyond all use")


def raise_exception(message: Any = "") -> None:
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    if len(form) > 1000:
        raise SecurityError("it formats the time with more than 1,000 characters")
    return datetime.now().strftime(form)


@jinja2.pass_environment
def _to_json(
    environment: Account,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter of that name; written piece by piece where an indent could make it large."""
    if indent is None and separators is None:
        environment.weigh(value, WRITTEN)
        return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    check_width(len(indent) if isinstance(indent, str) else indent or 0)
    return "".join(joined(environment, "", encoder.iterencode(value)))


def _check_replace(environment: Account, value: Any, old: Any = "", new: Any = "", count: Any = 0) -> None:
    text = str(value)
    environment.charge(text.count(str(old)) * text_bytes(str(new)))


def _check_indent(
    environment: Account, value: Any, width: Any = 4, first: Any = False, blank: Any = False
) -> None:
    size = text_bytes(width) if isinstance(width, str) else width
    check_width(size)
    environment.charge((str(value).count("\n") + 1) * max(0, size) + 8 * text_bytes(str(value)))


def _check_format(environment: Account, value: Any, *args: Any, **named: Any) -> None:
    charge_percent(environment, str(value), (*args, *named.values()))


def _check_sum(environment: Account, value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("it sums up what is no number")


def _check_trim(environment: Account, value: Any, chars: Any = None) -> None:
    check_sought(chars)


def _check_round(environment: Account, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > 100:
        raise SecurityError("it rounds to a precision beyond all use")


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    """jinja2's join over a list, charged before it is joined."""
    environment = context.environment
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return jinja2.filters.do_join(context, joined(environment, str(d), value), d)


@jinja2.pass_environment
def _batch(environment: Account, value: Any, linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check_width(linecount)
    return map(environment.made, jinja2.filters.do_batch(value, linecount, fill_with))


@jinja2.pass_environment
def _slice(environment: Account, value: Any, slices: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check_width(slices)
    return map(environment.made, jinja2.filters.sync_do_slice(value, slices, fill_with))


OWN_FILTERS: Mapping[str, Callable[..., Any]] = {
    "tojson": _to_json,
    "join": _join,
    "batch": _batch,
    "slice": _slice,
}
CHECKS: Mapping[str, Callable[..., None]] = {
    "center": lambda environment, value, width=80: check_width(width),
    "replace": _check_replace,
    "indent": _check_indent,
    "format": _check_format,
    "sum": _check_sum,
    "round": _check_round,
    "trim": _check_trim,
}
