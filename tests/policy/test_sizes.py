"""House figures: small functions, files that fit in the head."""

from __future__ import annotations

import statistics

from source_tree import ROOT, SOURCES, functions

MAX_FUNCTION = 80
MAX_OF_NINE_IN_TEN = 40
MAX_MEDIAN = 14
MAX_FILE = 350


def lengths() -> dict[str, int]:
    """Lines of every function, signature and docstring with it, by `file: name`."""
    found: dict[str, int] = {}
    for source in SOURCES:
        for function in functions(source.tree):
            name = f"{source.path.relative_to(ROOT).as_posix()}: {function.name}"
            key = f"{name} (line {function.lineno})" if name in found else name
            found[key] = (function.end_lineno or 0) - function.lineno + 1
    return found


def test_no_function_is_too_long() -> None:
    long = {name: n for name, n in lengths().items() if n > MAX_FUNCTION}
    assert not long


def test_nine_in_ten_are_short() -> None:
    found = lengths()
    over = {name: n for name, n in found.items() if n > MAX_OF_NINE_IN_TEN}
    assert len(over) <= len(found) / 10, over


def test_the_median_is_small() -> None:
    assert statistics.median(lengths().values()) <= MAX_MEDIAN


def test_no_file_is_too_long() -> None:
    counts = {source.path: len(source.path.read_text(encoding="utf-8").splitlines()) for source in SOURCES}
    long = {str(path.relative_to(ROOT)): n for path, n in counts.items() if n > MAX_FILE}
    assert not long, "split these by noun"
