"""Filters and functions that chat templates have, each with what bounds it (see sandbox.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Protocol

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

ITEM = 16  # what an item of a collection is charged
MAX_WIDTH = 10_000  # characters that something may be padded to
# Filters and what a character or an item of their input is charged. 0: they look at the ends alone.
FILTERS: Mapping[str, int] = {
    **dict.fromkeys(("default", "d", "length", "count", "first", "last", "abs", "attr", "int", "float", "round"), 0),
    **dict.fromkeys(("trim", "lower", "upper", "capitalize", "string", "escape", "e", "safe", "truncate"), 1),
    **dict.fromkeys(("replace", "indent", "center", "join", "format", "tojson", "items", "reverse"), 1),
    **dict.fromkeys(("title", "wordcount", "list", "sort", "unique", "dictsort", "sum", "min", "max"), 32),
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr", "groupby"), 32),
}  # fmt: skip


class Account(Protocol):
    """What sandbox.py's environment keeps of one rendering."""

    def charge(self, num_bytes: int) -> None: ...

    def made(self, value: Any) -> Any: ...

    def joined(self, separator: str, items: Iterable[Any]) -> list[Any]: ...

    def check_percent(self, text: str, values: Any) -> None: ...


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


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


def text_bytes(value: Any) -> int:
    """About what a text takes in memory; of a collection, of its items' places alone."""
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    if isinstance(value, list | tuple | dict | bytes):
        return ITEM * len(value)
    return ITEM


def check_width(width: Any = 0) -> None:
    if not isinstance(width, int) or width > MAX_WIDTH:
        raise SecurityError(f"it pads text to a width of {str(width)[:20]}")


def check_spec(spec: str) -> None:
    """A width or precision in a format is a short number that stands there."""
    digits = "".join(character if character.isdigit() else " " for character in spec).split()
    if "*" in spec or any(len(number) > len(str(MAX_WIDTH)) or int(number) > MAX_WIDTH for number in digits):
        raise SecurityError("it formats with a width that is too long or not written out")


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
        environment.made([value])
        return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    check_width(len(indent) if isinstance(indent, str) else indent or 0)
    return "".join(environment.joined("", encoder.iterencode(value)))


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
    environment.check_percent(str(value), (*args, *named.values()))


def _check_sum(environment: Account, value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("it sums up what is no number")


def _check_round(environment: Account, value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > 100:
        raise SecurityError("it rounds to a precision beyond all use")


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    """jinja2's join over a list, charged before it is joined."""
    environment = context.environment
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return jinja2.filters.do_join(context, environment.joined(str(d), value), d)


OWN_FILTERS: Mapping[str, Callable[..., Any]] = {"tojson": _to_json, "join": _join}
CHECKS: Mapping[str, Callable[..., None]] = {
    "center": lambda environment, value, width=80: check_width(width),
    "replace": _check_replace,
    "indent": _check_indent,
    "format": _check_format,
    "sum": _check_sum,
    "round": _check_round,
}
