"""Numbers as words: how the report writes shares, times and counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def count(number: int) -> str:
    return f"{number:,}"


def duration(seconds: float) -> str:
    """Two units at most: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def power(number: float) -> str:
    """1.2 × 10⁻⁶, as it is read."""
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}\u00a0×\u00a010{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def three_decimals(number: float) -> str:
    return f"{number:.3f}"


def four_decimals(number: float) -> str:
    return "<0.0001" if 0 < number < 5e-5 else f"{number:.4f}"


def optional(value: Any, words: Callable[[Any], str]) -> str:
    return "–" if value is None else words(value)


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def date(stamp: str) -> str:
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{moment.day} {moment:%B %Y}"
