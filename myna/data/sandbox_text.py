"""Methods of text that a chat template has, and its formatting, each with what bounds it (see sandbox.py)."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError

from myna.data.sandbox_account import ITEM, WRITTEN, Account, text_bytes

MAX_WIDTH = 10_000  # characters that something may be padded to
MAX_SOUGHT = (
    256  # characters of what is stripped, or sought from behind: each is compared with each of the text
)

# What is missing here makes no text, or can't be bounded.
TEXT_METHODS = frozenset(
    [
        "capitalize",
        "casefold",
        "center",
        "count",
        "endswith",
        "find",
        "format",
        "format_map",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "ljust",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rjust",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
        "zfill",
    ]
)
PADS = frozenset({"center", "ljust", "rjust", "zfill"})
CUTS = frozenset({"split", "rsplit", "splitlines"})
SLOW_SEARCHES = frozenset({"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"})
CHECKED = PADS | CUTS | SLOW_SEARCHES | {"replace", "join"}
CONVERSION = re.compile(r"%(?:\([^()%]*\))?([#0\- +.*0-9]*)(.?)", re.DOTALL)


def check_width(width: Any = 0) -> None:
    """SecurityError for a width that is no short number."""
    if not isinstance(width, int) or width > MAX_WIDTH:
        raise SecurityError(f"it pads text to a width of {str(width)[:20]}")


def check_sought(sought: Any = None) -> None:
    """SecurityError for a text to seek that would take its length times that of the other."""
    if isinstance(sought, str) and len(sought) > MAX_SOUGHT:
        raise SecurityError(f"it strips or seeks from behind more than {MAX_SOUGHT} characters")


def check_spec(spec: str) -> None:
    """A width or precision in a format is a short number that stands there."""
    digits = "".join(character if character.isdigit() else " " for character in spec).split()
    if "*" in spec or any(len(number) > len(str(MAX_WIDTH)) or int(number) > MAX_WIDTH for number in digits):
        raise SecurityError("it formats with a width that is too long or not written out")


def charge_method(
    account: Account, text: str, method: str, args: tuple[Any, ...], named: Mapping[str, Any]
) -> Any:
    """Charges a method of text by what it will make. An iterable is read for that, so `args` come back with a list."""
    account.charge(len(text) if text.isascii() else 4 * len(text))
    if len(text) > MAX_SOUGHT:
        account.compared(text)
    if method not in CHECKED:
        return args
    if method in SLOW_SEARCHES:
        for sought in (*args, *named.values()):
            check_sought(sought)
    if method in PADS:
        check_width(*args[:1])
    elif method == "replace" and len(args) > 1:
        account.charge(text.count(*args[:1]) * text_bytes(args[1]))
    elif method == "join" and args:
        return ([*joined(account, text, args[0])],)
    elif method in CUTS:
        separated = bool(args) and isinstance(args[0], str) and bool(args[0])
        account.charge(ITEM * (text.count(args[0]) + 1 if separated else len(text)))
    return args


def joined(account: Account, separator: str, items: Any) -> list[Any]:
    """The items that are to be joined, charged one by one."""
    found = []
    for item in account.turns(items):
        account.charge(text_bytes(separator) + ITEM)
        account.weigh(item, 1 if isinstance(item, str) else WRITTEN)
        found.append(item)
    return found


def charge_percent(account: Account, text: str, values: Any) -> None:
    """`%` formatting without widths that are long or come from a value; each conversion may write all that is given."""
    conversions = 0
    for conversion in CONVERSION.finditer(text):
        spec, kind = conversion.groups()
        if kind == "(":
            raise SecurityError("it formats a value by a name that can't be read")
        check_spec(spec)
        conversions += 1
        account.charge(MAX_WIDTH if len(spec) > 3 else ITEM)
    account.charge(text_bytes(text))
    account.weigh(values, WRITTEN * conversions)


def charge_format(account: Account, text: str, values: tuple[Any, ...]) -> None:
    """`format` without widths that are long or come from a value, of values and not of what is in them."""
    fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    for _, name, spec, _ in fields:
        check_spec((spec or "").replace("{", "*"))
        if name and not name.isalnum() and not name.isidentifier():
            raise SecurityError("it formats what is inside a value")
    account.charge(text_bytes(text) + len(fields) * MAX_WIDTH)
    account.weigh(values, WRITTEN * len(fields))
