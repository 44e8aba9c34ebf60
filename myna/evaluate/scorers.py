"""How an answer is scored against the expected one, and how sure the share of right answers is.

A scorer is a function of two texts, `(answer, expected) -> float in [0, 1]`, listed in `SCORERS`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from myna.interval import wilson_interval

Pair = tuple[tuple[str | int, ...], tuple[str, Any]]
"""A key path and the value found there, with its JSON type so that `true` is not `1`."""

_WORD: Final = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
_ARTICLES: Final = frozenset({"a", "an", "the"})
_NOT_JSON: Final = object()


@dataclass(frozen=True)
class Scorer:
    """One line of `SCORERS`: the function, what it says in words, and for which rows it means anything."""

    function: Callable[[str, str], float]
    description: str
    applies: Callable[[Sequence[str]], bool]


@dataclass(frozen=True)
class Scores:
    """What a set of answers scored, all in [0, 1]; `interval` is the 95 % Wilson interval of `exact_match`.

    `field_f1` is micro-averaged: pairs are counted over all rows, then one F1 is taken, so a row with ten
    fields weighs ten times a row with one. It is None where the expected answers are not JSON objects.
    `token_f1` is the mean over rows, as SQuAD has it.
    """

    exact_match: float
    interval: tuple[float, float]
    field_f1: float | None
    token_f1: float
    num_rows: int

    def to_json(self) -> dict[str, Any]:
        """As `evaluation.json` has it."""
        return {
            "exact_match": self.exact_match,
            "interval": list(self.interval),
            "field_f1": self.field_f1,
            "token_f1": self.token_f1,
            "num_rows": self.num_rows,
        }


def exact_match(answer: str, expected: str) -> float:
    """1 where the texts are equal but for the whitespace around them, or are the same JSON.

    Only where `expected` is an object or an array is the answer read as JSON: key order and spacing do not
    matter, numbers are compared by value, and a key that the answer gives twice makes it wrong.
    """
    if answer.strip() == expected.strip():
        return 1.0
    expected_value = _parse(expected)
    if not isinstance(expected_value, dict | list):
        return 0.0
    return float(_pairs(_parse(answer)) == _pairs(expected_value))


def field_f1(answer: str, expected: str) -> float:
    """F1 of one row over its (key path, value) pairs; array elements are keyed by position.

    An answer that is no JSON object scores 0. Where `expected` is none, the row has no fields and the score
    is 0 too: ask `field_f1_applies` first.
    """
    return _f1(*_field_counts(answer, expected))


def field_f1_applies(expected: Sequence[str]) -> bool:
    """True where there are expected answers and every one of them is a JSON object."""
    return bool(expected) and all(isinstance(_parse(text), dict) for text in expected)


def token_f1(answer: str, expected: str) -> float:
    """F1 over bags of words, after Rajpurkar et al. 2016 (SQuAD): no case, punctuation, English articles.

    Where either bag is empty the score is 1 if both are, else 0. A word is a number or a run of letters, so
    text without spaces between words (Chinese, Japanese) is compared by the run.
    """
    answer_words, expected_words = Counter(_words(answer)), Counter(_words(expected))
    if not answer_words or not expected_words:
        return float(answer_words == expected_words)
    num_shared = (answer_words & expected_words).total()
    return _f1(num_shared, answer_words.total(), expected_words.total())


SCORERS: Final[Mapping[str, Scorer]] = {
    "exact_match": Scorer(
        exact_match, "the share of answers that are exactly right (JSON: the same value)", bool
    ),
    "field_f1": Scorer(
        field_f1, "F1 over the fields of JSON objects: partly right answers count in part", field_f1_applies
    ),
    "token_f1": Scorer(token_f1, "F1 over the words: for free text", bool),
}


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> Scores:
    """Score `answers[i]` against `expected[i]` for all rows. Raises ValueError where the lengths differ."""
    rows = list(zip(answers, expected, strict=True))
    num_right = sum(exact_match(answer, truth) == 1.0 for answer, truth in rows)
    counts = [_field_counts(*row) for row in rows] if field_f1_applies(expected) else None
    return Scores(
        exact_match=num_right / len(rows) if rows else 0.0,
        interval=wilson_interval(num_right, len(rows)),
        field_f1=None if counts is None else _f1(*(sum(column) for column in zip(*counts, strict=True))),
        token_f1=sum(token_f1(*row) for row in rows) / len(rows) if rows else 0.0,
        num_rows=len(rows),
    )


def _field_counts(answer: str, expected: str) -> tuple[int, int, int]:
    """How many pairs of an answer are right, how many it gives, and how many are expected."""
    expected_value, answer_value = _parse(expected), _parse(answer)
    wanted = _pairs(expected_value) if isinstance(expected_value, dict) else frozenset()
    given = _pairs(answer_value) if isinstance(answer_value, dict) else frozenset()
    return len(given & wanted), len(given), len(wanted)


def _f1(num_right: int, num_given: int, num_expected: int) -> float:
    return 2 * num_right / (num_given + num_expected) if num_right else 0.0


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.casefold()) if word not in _ARTICLES]


def _parse(text: str) -> object:
    """The JSON value of a text, or `_NOT_JSON`: a model may answer anything, also a thousand brackets."""
    try:
        return json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _pairs(value: Any) -> frozenset[Pair]:
    """Every leaf (a scalar or an empty container) with its path; by a stack, since answers may nest deep."""
    pairs: list[Pair] = []
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and node:
            stack += [((*path, key), child) for key, child in node.items()]
        elif isinstance(node, list) and node:
            stack += [((*path, position), child) for position, child in enumerate(node)]
        else:
            pairs.append((path, _leaf(node)))
    return frozenset(pairs)


def _leaf(value: Any) -> tuple[str, Any]:
    if isinstance(value, dict | list):
        return (type(value).__name__, None)
    return ("number" if type(value) in (int, float) else type(value).__name__, value)
