from __future__ import annotations

import json
import math

import pytest

from myna.evaluate.scorers import (
    SCORERS,
    exact_match,
    field_f1,
    field_f1_applies,
    score_answers,
    token_f1,
)
from myna.interval import wilson_interval

ORDER = '{"item": "paint brushes", "quantity": 435, "to": {"city": "Bergen", "tags": ["a", "b"]}}'


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("spam", "spam", True),
        ("  spam\n", "spam", True),
        ("Spam", "spam", False),
        ("", "", True),
        ("", "spam", False),
        ('{"b":2,\n"a":[1,{"c":null}]}', '{"a": [1, {"c": null}], "b": 2}', True),
        ('{"a": 1.0}', '{"a": 1}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": {}}', '{"a": []}', False),
        ('{"a": []}', '{"a": null}', False),
        ('{"b": 1}', '{"a": [], "b": 1}', False),
        ("[2, 1]", "[1, 2]", False),
        ("[ 1,2 ]", "[1, 2]", True),
        ("[1, 2, 3]", "[1, 2]", False),
        ('{"0": 1}', "[1]", False),
        ('{"a": 1, "a": 1}', '{"a": 1}', False),
        ('{"a": {"b": 1, "b": 2}}', '{"a": {"b": 2}}', False),
        ('```json\n{"a": 1}\n```', '{"a": 1}', False),
        ('{"a": 1} and more', '{"a": 1}', False),
        ('{"a": NaN}', '{"a": 1}', False),
        ("7.0", "7", False),  # a bare number is text: only objects and arrays are read as JSON
        ('"x"', '"x" ', True),
        ("[" * 100_000, "[1]", False),
    ],
)
def test_exact_match(answer: str, expected: str, right: bool) -> None:
    assert exact_match(answer, expected) == float(right)


def test_exact_match_reads_an_answer_nested_deep() -> None:
    deep = "[" * 400 + "]" * 400
    assert exact_match(deep, deep.replace("[", "[ ")) == 1.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (ORDER, 1.0),
        (json.dumps(json.loads(ORDER), sort_keys=True, indent=2), 1.0),
        ("not json", 0.0),
        ("[1]", 0.0),
        ("{}", 0.0),
        # 4 of the 5 expected, 5 given: 2 * 4 / (5 + 5)
        (ORDER.replace("435", "436"), 0.8),
        # 3 right, 3 given, 5 expected
        ('{"item": "paint brushes", "quantity": 435, "to": {"city": "Bergen"}}', 6 / 8),
        # the right value under the wrong path is worth nothing
        ('{"city": "Bergen"}', 0.0),
    ],
)
def test_field_f1_of_one_row(answer: str, score: float) -> None:
    assert field_f1(answer, ORDER) == pytest.approx(score)


def test_field_f1_is_for_json_objects_alone() -> None:
    assert field_f1_applies([ORDER, "{}"])
    assert not field_f1_applies([ORDER, "[1]"])
    assert not field_f1_applies([ORDER, "spam"])
    assert not field_f1_applies([])
    assert score_answers(["spam"], ["spam"]).field_f1 is None


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("The cat sat.", "a cat sat", 1.0),
        ("cat cat", "cat", 2 / 3),
        ("cat cat dog", "cat cat", 0.8),
        ("the dog", "the cat", 0.0),
        ("", "the", 1.0),
        ("", "cat", 0.0),
        ("Don't stop", "don't stop!", 1.0),
        ("costs 3.14 euros", "costs 3.15 euros", 2 / 3),
        ("Ärger", "ärger", 1.0),
    ],
)
def test_token_f1(answer: str, expected: str, score: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("num_right", "num_rows", "low", "high"),
    [  # Newcombe 1998, table I (method 3: Wilson without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_the_published_table(num_right: int, num_rows: int, low: float, high: float) -> None:
    assert wilson_interval(num_right, num_rows) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_its_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for num_rows in range(1, 500):
        assert wilson_interval(0, num_rows)[0] == 0.0
        assert wilson_interval(num_rows, num_rows)[1] == 1.0
    with pytest.raises(AssertionError):
        wilson_interval(2, 1)


def test_wilson_inverts_the_score_test() -> None:
    # The bounds p are where the distance of the share from p is z standard errors *at p*.
    z = 1.959963984540054
    for num_right, num_rows in ((1, 4), (95, 100), (50, 100)):
        for p in wilson_interval(num_right, num_rows):
            error = math.sqrt(p * (1 - p) / num_rows)
            assert abs(num_right / num_rows - p) == pytest.approx(z * error)


def test_scores_of_many_rows() -> None:
    expected = ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}']
    scores = score_answers(['{"a": 1}', '{"a": 9, "b": 9, "c": 9}'], expected)
    assert scores.num_rows == 2
    assert scores.exact_match == 0.5
    assert scores.interval == wilson_interval(1, 2)
    # micro: one of four pairs right; the mean over rows would be 0.5
    assert scores.field_f1 == pytest.approx(0.25)
    assert scores.to_json()["interval"] == list(scores.interval)


def test_scores_of_no_rows_say_that_nothing_is_known() -> None:
    scores = score_answers([], [])
    assert (scores.exact_match, scores.interval, scores.field_f1) == (0.0, (0.0, 1.0), None)


def test_an_answer_short_is_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_answers(["one"], ["one", "two"])


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_scorer_of_the_table(name: str) -> None:
    scorer = SCORERS[name]
    assert scorer.description
    assert scorer.function(ORDER, ORDER) == 1.0
    assert scorer.function("something else", ORDER) == 0.0
    assert scorer.applies([ORDER])
    assert not scorer.applies([])
    for answer in ("", "{", ORDER[:30], "[" * 10_000, "\ud800", ORDER.replace("435", "4")):
        assert 0.0 <= scorer.function(answer, ORDER) <= 1.0
